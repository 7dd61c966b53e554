"""Which paths clients reach, however they spell them, and which requests may be sent twice.

Covered: traversals, encodings, management endpoints, paths that are allowed by name. Not covered: that each path of an
engine's API works through the router (tests/real_vllm).
"""

from __future__ import annotations

import asyncio
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.server.paths import Access, access, is_plain, repeatable
from router.settings import Settings
from runtime.settings import SettingsError
from tests.router.conftest import RunningRouter, StartRouter
from tests.router.fakes import Connection, Received, fake_workers, good

TRAVERSALS = [
    "/v1/%252e%252e/metrics", "/v1/%25252e%25252e/metrics", "/v1/..%2fmetrics", "/v1/%2e%2e%2fmetrics",
    "/v1/..%5cmetrics", "/v1/models/..;/../metrics", "/v1/models/%2e%2e;x=1/metrics", "/v1/./metrics", "/v1//metrics",
    "/v1/models//../x", "/v1/%c0%ae%c0%ae/metrics", "/v1/%ef%bc%8e%ef%bc%8e/metrics", "/v1/models/%00",
    "/v1/models/%0a",
    "/v1/models/.%20/x", "/v1/models/%u002e%u002e/x", "/v1/models/100%25", "/%2e/v1/models", "/v1/models/..",
]  # fmt: skip


async def raw(router: RunningRouter, method: str, target: str, headers: str = "") -> bytes:
    """One request as it is written here: clients tidy paths up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
    writer.write(f"{method} {target} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{headers}\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_what_a_server_might_resolve_to_another_path_is_not_passed_on(
    start_router: StartRouter, path: str
) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        assert (await raw(router, "GET", path)).startswith(b"HTTP/1.1 404 ")
        assert workers[0].received == []


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load%5Flora_adapter", "/v1/load_lora_adapter/",
             "/%761/load_lora_adapter", "/v1/LOAD_lora_adapter", "/v1/reset_prefix_cache", "/v1/sleep", "/v1/"],
)  # fmt: skip
async def test_management_verbs_are_refused(start_router: StartRouter, path: str) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        assert (await raw(router, "POST", path)).startswith(b"HTTP/1.1 404 ")
        assert workers[0].received == []


async def test_inference_apis_outside_of_v1_are_open_and_management_beside_them_is_not(
    start_router: StartRouter,
) -> None:
    computed = ["/rerank", "/v2/rerank", "/score", "/pooling", "/classify", "/v2/embed", "/invocations"]
    closed = ["/sleep", "/pause", "/abort_requests", "/scale_elastic_ep", "/update_weights", "/inference/v1/generate",
              "/v2", "/v2/", "/rerank/x", "/reset_prefix_cache"]  # fmt: skip
    async with fake_workers(good) as workers, start_router(workers) as router:
        for path in computed:
            assert repeatable("POST", path)
            assert (await router.client.post(path, json={"model": "m"})).status_code == 200
        for path in closed:
            assert (await router.client.post(path, json={"model": "m"})).status_code == 404
        assert [received.target for received in workers[0].received] == computed


async def test_what_is_allowed_by_name_is_passed_on_and_nothing_beside_it(start_router: StartRouter) -> None:
    allowed = "/v1/load_lora_adapter,/tokenizer_info"
    async with fake_workers(good) as workers, start_router(workers, allowed_paths=allowed) as router:
        for path in ("/v1/load_lora_adapter", "/tokenizer_info"):
            assert (await router.client.post(path)).status_code == 200
        refused = await router.client.post("/v1/unload_lora_adapter")
        assert refused.status_code == 404
        assert "--allowed-paths" in refused.json()["error"]["message"]
        assert [received.target for received in workers[0].received] == ["/v1/load_lora_adapter", "/tokenizer_info"]


@pytest.mark.parametrize("path", ["v1/x", "/v1/../x", "/v1/%2e", "/x/", "/"])
def test_a_path_that_cannot_be_allowed_is_refused_by_name(path: str) -> None:
    with pytest.raises(SettingsError, match="no path that can be allowed"):
        Settings.load(["--allowed-paths", path])


async def test_a_trailing_slash_is_redirected_to_where_the_client_came_from(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        response = await router.client.post("/v1/completions/?a=b", json={})
        assert response.status_code == 307
        assert response.headers["location"] == "/v1/completions?a=b"
        assert workers[0].received == []
        # vLLM decodes it and would redirect to `http://ITS OWN ADDRESS/v1/models`.
        assert b"\r\nlocation: /v1/models\r\n" in await raw(router, "GET", "/v1/models%2F")
        assert workers[0].received == []


async def test_a_worker_sees_one_spelling_of_a_path(start_router: StartRouter) -> None:
    """The one that was judged: what is known of a path (its refusals, that it may be sent twice) is not gone round."""
    async with fake_workers(good) as workers, start_router(workers) as router:
        for target in (
            "/v1/models/org/a%20b%3Fx@1",
            "/v1/%6dodels/org%2Fa%20b%3fx%401",
            "/%761/models/org/a%20b%3Fx%401",
        ):
            assert (await raw(router, "GET", target + "?q=%2f;[")).startswith(b"HTTP/1.1 200 ")
        (seen,) = {received.target for received in workers[0].received}
        assert seen == "/v1/models/org/a%20b%3Fx@1?q=%2f;["


async def test_a_refusal_is_doubted_once_however_its_path_is_spelled(start_router: StartRouter) -> None:
    async def refusing(connection: Connection, request: Received) -> None:
        await connection.answer(404, b"{}")

    async with fake_workers(refusing, refusing) as workers, start_router(workers) as router:
        for target in ("/v1/models/x", "/v1/models/%78", "/v1/%6dodels/x", "/v1/models%2Fx"):
            assert (await raw(router, "GET", target)).startswith(b"HTTP/1.1 404 ")
        assert sum(len(worker.received) for worker in workers) == 5


PIECES = st.sampled_from(
    ["..", ".", "%2e", "%2E%2e", "%252e", "%25", "%2f", "/", "//", "\\", "%5c", ";", ";a=b", "v1", "models", "metrics",
     "files", "a b", "%20", "．", "‥", "%c0%ae", "\x00", "%00", "%"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=8).map(lambda pieces: "/v1/models/" + "".join(pieces)))
@example("/v1/models/%252e%252e/%252e%252e/metrics")
def test_however_often_a_plain_path_is_decoded_it_stays_below_its_resource(target: str) -> None:
    """A reader that decodes again and again, takes backslashes for slashes, drops parameters and resolves dots."""
    path = unquote(target)
    if access(path) is not Access.PASSED:
        return
    seen = path
    for _ in range(4):
        depth = 0
        for segment in seen.replace("\\", "/").split("/")[1:]:
            depth += {"..": -1, ".": 0, "": 0}.get(segment.partition(";")[0].strip(), 1)
            assert depth >= 0
        assert ".." not in seen.replace(";", "/").split("/")
        seen = unquote(seen)
    assert seen == path


@given(st.text(st.characters(categories=("L", "N")), min_size=1))
def test_names_in_any_script_are_plain(name: str) -> None:
    assert is_plain("/v1/models/" + unquote(quote(name)))


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/embeddings", True),
        ("POST", "/v1/load_lora_adapter", False),
        ("POST", "/v1/files", False),
        ("POST", "/v1/responses/r/cancel", False),
        ("GET", "/v1/responses/r", True),
        ("DELETE", "/v1/files/f", True),
        ("PATCH", "/v1/files/f", False),
    ],
)
def test_what_may_be_sent_twice(method: str, path: str, expected: bool) -> None:
    assert repeatable(method, path) is expected
