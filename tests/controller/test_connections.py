"""All connections to the API server.

Covers: what is logged of a server that comes and goes, which answers count, breaking connections, and the ages of
watches. Not covered: when connections are broken (test_watch_liveness.py), and kopf (tests/kube/operator).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from controller.kube.connections import ApiServerConnections, ApiServerEvent, ApiServerState, without_retry_lines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "controller.kube.connections"]


def test_one_line_when_it_goes_and_one_when_it_is_back(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    connections = ApiServerConnections(Clock())
    connections.advance(ApiServerEvent.FAILED, "refused")
    connections.advance(ApiServerEvent.ANSWERED)
    assert lines(caplog) == [], "one connection that is cut is nothing to speak of"
    for _ in range(20):
        connections.advance(ApiServerEvent.FAILED, "refused")
    assert (connections.state, lines(caplog)) == (ApiServerState.LOST, ["api_server_lost"])
    connections.advance(ApiServerEvent.REFUSED)
    assert connections.state is ApiServerState.LOST, "a server that has just started refuses everything"
    for _ in range(3):
        connections.advance(ApiServerEvent.ANSWERED)
    assert (connections.state, lines(caplog)) == (ApiServerState.ANSWERING, ["api_server_lost", "api_server_restored"])


def test_kopfs_line_for_each_request_is_dropped_while_requests_fail(caplog: pytest.LogCaptureFixture):
    connections, kopf = ApiServerConnections(Clock()), logging.getLogger("kopf.clients")
    failed = "Request attempt #1/9 failed; will retry: GET /api -> APIForbiddenError"
    with without_retry_lines(connections):
        kopf.error(failed)
        connections.advance(ApiServerEvent.FAILED, "refused")
        kopf.error(failed)
        kopf.error("something else")
        connections.advance(ApiServerEvent.ANSWERED)
    kopf.error(failed)
    said = [record.getMessage() for record in caplog.records if record.name == kopf.name]
    assert said == [failed, "something else", failed]


async def test_what_it_observes_and_cuts():
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/busy":
            return web.Response(status=503)
        if request.path == "/refused":
            return web.Response(status=403)
        if request.path == "/webhook":
            return web.Response(status=500)
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    runner, url = await serving(answer)
    failed: list[tuple[str, str]] = []
    connections = ApiServerConnections(Clock(), lambda operation, cause: failed.append((operation, cause)))
    connector = aiohttp.TCPConnector(socket_factory=connections.socket)
    async with aiohttp.ClientSession(url, connector=connector, middlewares=[connections.observe]) as api:
        doubtful, answering = ApiServerState.DOUBTFUL, ApiServerState.ANSWERING
        steps = (
            ("/webhook", answering), ("/webhook", answering), ("/busy", doubtful), ("/webhook", doubtful),
            ("/refused", answering), ("/busy", doubtful),
        )  # fmt: skip
        for path, state in steps:
            async with api.get(path):
                assert connections.state is state
        async with api.get("/watch") as watch:
            assert connections.state is ApiServerState.ANSWERING
            connections.cut()
            with pytest.raises(aiohttp.ClientError):
                await watch.content.readany()
        async with api.get("/refused"):
            pass
        await runner.cleanup()
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await api.get("/refused")
        assert connections.state is ApiServerState.LOST
    reads = ["server_error"] * 3 + ["server_error", "forbidden", "server_error", "forbidden", "connect", "connect"]
    assert failed == [("read", cause) for cause in reads], "each is counted by its cause"


async def test_the_ages_of_watches():
    more = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if "keda.sh" in request.path:
            return web.Response(status=404 if "watch" not in request.query else 200, text="{}\n")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{}\n")
        await more.wait()
        await response.write(b"{}\n")
        return response

    runner, url = await serving(answer)
    clock = Clock()
    connections = ApiServerConnections(clock)
    watch = {"watch": "true"}
    async with aiohttp.ClientSession(url, middlewares=[connections.observe_watches]) as api:
        async with api.get("/api/v1/pods") as listed:
            assert listed.status == 200
        assert connections.watches.ages() == {}, "a list is no watch"
        async with (
            api.get("/api/v1/namespaces/a/pods", params=watch) as first,
            api.get("/api/v1/namespaces/b/pods", params=watch) as second,
            api.get("/apis/keda.sh/v1alpha1/scaledobjects", params=watch),
        ):
            clock.now = 10.0
            assert connections.watches.ages() == {"pods": 10.0, "scaledobjects": 10.0}
            chunks = [response.content.iter_chunked(1024) for response in (first, second)]
            await anext(chunks[0])
            assert connections.watches.ages()["pods"] == 10.0, "that of the other namespace is still silent"
            await anext(chunks[1])
            assert connections.watches.ages()["pods"] == 0.0
            clock.now = 30.0
            more.set()
            assert connections.watches.ages()["pods"] == 20.0
            assert [await anext(each) for each in chunks] == [b"{}\n"] * 2
            assert connections.watches.ages()["pods"] == 0.0
            async with api.get("/apis/keda.sh/v1alpha1/scaledobjects"):
                assert connections.watches.ages() == {"pods": 0.0}, "what is not there needs no watch"
        await runner.cleanup()


async def serving(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> tuple[web.AppRunner, str]:
    """A server that answers GET so, and its URL."""
    app = web.Application()
    app.router.add_get("/{anything:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    return runner, f"http://{host}:{port}"
