"""Requests and watches over real sockets.

Covers: that our sockets and middlewares are those of every connection (which rests on two public attributes of the
official client: `Configuration.client_session_kwargs` and the `ssl_context` of its REST client), the error that each
kind of failure becomes, the end of a watch. Not covered: credentials (test_credentials.py), what a server makes of a
request (tests/kube/operator).
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from runtime.kube.client import Address, ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from runtime.sockets import kept_alive
from tests.router.discovery.scripted import ScriptedApi
from tests.runtime.kube.objects import status

pytestmark = pytest.mark.process

SLICES = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"


@pytest.fixture
async def api() -> AsyncIterator[ScriptedApi]:
    made = ScriptedApi()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def server(api: ScriptedApi, tmp_path: Path) -> AsyncIterator[ApiServer]:
    found = await find_credentials(api.kubeconfig(tmp_path / "kubeconfig"))
    async with ApiServer(found, "a-test") as made:
        yield made


async def test_every_connection_has_our_sockets_and_every_request_passes_our_middlewares(
    api: ScriptedApi, tmp_path: Path
) -> None:
    made: list[socket.socket] = []
    passed: list[str] = []

    def sockets(address: Address) -> socket.socket:
        made.append(kept_alive(address))
        return made[-1]

    async def middleware(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        passed.append(request.url.path)
        return await send(request)

    found = await find_credentials(api.kubeconfig(tmp_path / "kubeconfig"))
    async with ApiServer(found, "a-test", sockets=sockets, middlewares=(middleware,)) as server:
        await server.request("GET", SLICES)
        await server.request_object("GET", SLICES, {"labelSelector": "a in (b,c)"})
        stream = await server.watch(SLICES, Watch("0", 10), 1.0)
        assert passed == [SLICES] * 3
        assert len(made) == 1, "an idle connection is used again"
        assert made[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        stream.close()
    assert all(each.fileno() == -1 for each in made), "closed with the pool"
    assert api.questions[1]["labelSelector"] == "a in (b,c)"


@pytest.mark.parametrize(
    ("answer", "cause", "retry_after"),
    [
        pytest.param((401, status(401, "Unauthorized", "no"), ""), ApiFailureCause.UNAUTHORIZED, None, id="401"),
        pytest.param((403, status(403, "Forbidden", "no"), ""), ApiFailureCause.FORBIDDEN, None, id="403"),
        pytest.param((404, status(404, "NotFound", "no"), ""), ApiFailureCause.STATUS, None, id="404"),
        pytest.param((410, status(410, "Expired", "no"), ""), ApiFailureCause.EXPIRED, None, id="410"),
        pytest.param(
            (429, status(429, "TooManyRequests", "no"), "Retry-After: 7\r\n"), ApiFailureCause.THROTTLED, 7.0, id="429"
        ),
        pytest.param((503, status(503, "", "no", retryAfterSeconds=2), ""), ApiFailureCause.SERVER, 2.0, id="503"),
    ],
)
async def test_a_refusal_is_one_typed_error(
    api: ScriptedApi,
    server: ApiServer,
    answer: tuple[int, object, str],
    cause: ApiFailureCause,
    retry_after: float | None,
) -> None:
    api.refusals = [answer] * 2
    for asking in (server.request("GET", SLICES), server.watch(SLICES, Watch("0", 1), 1.0)):
        with pytest.raises(KubeApiError) as raised:
            await asking
        error = raised.value
        assert (error.status, error.message, error.cause, error.retry_after) == (answer[0], "no", cause, retry_after)
        assert str(error) == f"{answer[0]} {error.reason}".strip() + ": no"


async def test_an_answer_that_is_no_object_is_malformed(api: ScriptedApi, server: ApiServer) -> None:
    api.refusals = [(200, ["a list"], "")]
    with pytest.raises(KubeApiError, match="no JSON object") as raised:
        await server.request_object("GET", SLICES)
    assert (raised.value.status, raised.value.cause) == (0, ApiFailureCause.MALFORMED)


async def test_a_server_that_is_not_there_is_named(api: ScriptedApi, server: ApiServer) -> None:
    await api.stop()
    with pytest.raises(KubeApiError, match=f"the API server cannot be reached: {api.url}") as raised:
        await server.request("GET", SLICES)
    assert (raised.value.status, raised.value.cause) == (0, ApiFailureCause.CONNECT)
    await api.start()


async def test_a_server_that_does_not_answer_in_time_is_as_good_as_away(api: ScriptedApi, tmp_path: Path) -> None:
    api.frozen.set()
    found = await find_credentials(api.kubeconfig(tmp_path / "kubeconfig"))
    async with ApiServer(found, "a-test", timeout=0.05) as server:
        for asking in (server.request("GET", SLICES), server.watch(SLICES, Watch("0", 1), 1.0)):
            with pytest.raises(KubeApiError, match=r"did not answer within 0\.05 s") as raised:
                await asking
            assert raised.value.cause is ApiFailureCause.CONNECT


async def test_a_watch_brings_events_until_it_ends(api: ScriptedApi, server: ApiServer) -> None:
    stream = await server.watch(SLICES, Watch("0", 10), 1.0)
    await api.say({"type": "BOOKMARK"})
    assert await stream.next() == {"type": "BOOKMARK"}
    await api.end_watches()
    assert await stream.next() is None


async def test_a_watch_that_is_cut(api: ScriptedApi, server: ApiServer) -> None:
    stream = await server.watch(SLICES, Watch("0", 10), 1.0)
    api.drop_feeds()
    with pytest.raises(KubeApiError) as raised:
        await stream.next()
    assert raised.value.cause is ApiFailureCause.CUT
    stream.close()


async def test_a_watch_that_outlasts_its_time_is_silent(server: ApiServer) -> None:
    stream = await server.watch(SLICES, Watch("0", 0), 0.01)
    with pytest.raises(KubeApiError) as raised:
        await stream.next()
    assert raised.value.cause is ApiFailureCause.SILENT
    stream.close()
