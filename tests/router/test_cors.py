"""What browsers ask before a page may use the data port, and what they need to see in answers."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import httpx
import pytest
from starlette.types import Message

from router.settings import Settings
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter, until
from tests.router.fakes import DONE, Connection, Received, completion, fake_workers, good, token

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


@pytest.mark.parametrize("origins", [PAGE, f"{PAGE},http://localhost:3000", "*"])
async def test_the_router_answers_preflights_even_when_no_worker_is_ready(
    start_router: StartRouter, origins: str
) -> None:
    async with start_router(cors_origins=origins) as router:
        response = await router.client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert (response.status_code, response.text) == (200, "OK")
        assert response.headers["access-control-allow-origin"] == ("*" if origins == "*" else PAGE)
        assert "POST" in response.headers["access-control-allow-methods"].split(", ")
        assert response.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "origin" in response.headers["vary"].lower()
        assert router.metric("requests_total", code="200", strategy="round_robin") == 1


async def test_a_page_of_another_origin_is_refused(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, cors_origins=PAGE) as router:
        headers = {**PREFLIGHT, "origin": "https://evil.example.com"}
        response = await router.client.options("/v1/chat/completions", headers=headers)
        assert (response.status_code, response.text) == (400, "Disallowed CORS origin")
        assert "access-control-allow-origin" not in response.headers
        response = await router.client.get("/v1/models", headers={"origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in response.headers
        assert workers[0].received != []  # only a browser's preflight keeps a page from sending


async def _error_without_worker(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "x"}, headers={"origin": PAGE})


async def _error_not_found(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/nothing", headers={"origin": PAGE})


async def _error_too_large(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/completions", content=b"x" * 2000, headers={"origin": PAGE})


@pytest.mark.parametrize(
    ("ask", "status"), [(_error_without_worker, 503), (_error_not_found, 404), (_error_too_large, 413)]
)
async def test_the_routers_own_errors_can_be_read_by_the_page(
    start_router: StartRouter, ask: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]], status: int
) -> None:
    async with start_router(cors_origins=PAGE, max_body_bytes=1000, retry_deadline=0) as router:
        response = await ask(router.client)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["access-control-expose-headers"] == "*"
        assert response.headers.get_list("vary") == ["Origin"]


async def test_what_a_worker_says_about_origins_is_replaced(start_router: StartRouter) -> None:
    async def own(connection: Connection, request: Received) -> None:
        extra = "access-control-allow-origin: *\r\nAccess-Control-Allow-Credentials: true\r\nvary: Origin\r\n"
        await connection.answer(200, completion("Hello"), extra=extra)

    async with fake_workers(own) as workers:
        async with start_router(workers, cors_origins=PAGE) as router:
            response = await router.client.get("/v1/models", headers={"origin": PAGE})
            assert response.headers.get_list("access-control-allow-origin") == [PAGE]
            assert "access-control-allow-credentials" not in response.headers
            assert response.headers.get_list("vary") == ["Origin"]
        async with start_router(workers) as router:
            response = await router.client.get("/v1/models", headers={"origin": PAGE})
            assert response.headers.get_list("access-control-allow-origin") == ["*"]


async def test_without_origins_preflights_are_the_workers_to_answer(start_router: StartRouter) -> None:
    async def refuse(connection: Connection, request: Received) -> None:
        await connection.answer(400, b"Disallowed CORS origin", "text/plain; charset=utf-8")

    async with fake_workers(refuse) as workers, start_router(workers) as router:
        response = await router.client.options("/v1/completions", headers=PREFLIGHT)
        assert (response.status_code, response.text) == (400, "Disallowed CORS origin")
        assert workers[0].received[0].header("access-control-request-method") == "POST"


@pytest.mark.parametrize(
    ("method", "path", "allow"), [("HEAD", "/v1/models", "GET"), ("OPTIONS", "/v1/completions", "POST")]
)
@pytest.mark.parametrize("origins", ["", PAGE])
async def test_head_and_options_get_the_workers_answer(
    start_router: StartRouter, method: str, path: str, allow: str, origins: str
) -> None:
    """As vLLM 0.32 was seen to answer: 405, the methods that there are, and no body to HEAD."""

    async def refuse(connection: Connection, request: Received) -> None:
        body = b'{"detail":"Method Not Allowed"}'
        head = (
            f"HTTP/1.1 405 X\r\nallow: {allow}\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
        )
        await connection.send(head.encode() + (b"" if request.method == "HEAD" else body))

    async with fake_workers(refuse) as workers, start_router(workers, cors_origins=origins) as router:
        for _ in range(2):
            response = await router.client.request(method, path)
            assert (response.status_code, response.headers["allow"]) == (405, allow)
            assert response.headers["content-length"] == "31"
            assert response.content == (b"" if method == "HEAD" else b'{"detail":"Method Not Allowed"}')
        assert len(workers[0].received) == 2


@pytest.mark.parametrize("origin", ["chat.example.com", "https://chat.example.com/", "https://a b", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="is no origin"):
        Settings.load(["--cors-origins", origin])


def test_the_total_of_bodies_has_room_for_one() -> None:
    with pytest.raises(SettingsError, match="max-total-body-bytes"):
        Settings.load(["--max-body-bytes", "1000", "--max-total-body-bytes", "999"])
    assert Settings.load(["--max-body-bytes", str(2**30)]).total_body_bytes == 2**32


async def test_when_bodies_take_all_the_memory_there_is_the_next_is_told_to_come_again(
    start_router: StartRouter,
) -> None:
    release = asyncio.Event()

    async def held(connection: Connection, request: Received) -> None:
        await release.wait()
        await good(connection, request)

    limits = {"max_body_bytes": 3_000_000, "max_total_body_bytes": 4_000_000}
    async with fake_workers(held) as workers, start_router(workers, **limits) as router:
        body = b"{" + b" " * 2_500_000 + b"}"
        first = asyncio.create_task(router.client.post("/v1/embeddings", content=body))
        await until(lambda: len(workers[0].received) == 1)
        refused = await router.client.post("/v1/embeddings", content=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        release.set()
        assert (await first).status_code == 200
        assert (await router.client.post("/v1/embeddings", content=body)).status_code == 200
        assert workers[0].received[0].body == body


async def test_a_body_takes_room_until_its_answer_begins(start_router: StartRouter) -> None:
    """A long stream does not keep its prompt's, or its images', bytes from others."""
    release = asyncio.Event()

    async def streaming(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(token("Hel"))
        await release.wait()
        await connection.chunk(token("lo", "length") + DONE)
        await connection.end_stream()

    limits = {"max_body_bytes": 3_000_000, "max_total_body_bytes": 4_000_000}
    async with fake_workers(streaming) as workers, start_router(workers, **limits) as router, AsyncExitStack() as open_:
        body = b"{" + b" " * 2_500_000 + b"}"
        streams = []
        for _ in range(4):
            answer = await open_.enter_async_context(router.client.stream("POST", "/v1/embeddings", content=body))
            streams.append(answer.aiter_bytes())
            assert await anext(streams[-1]) == token("Hel")
        release.set()
        for stream in streams:
            assert b"".join([piece async for piece in stream]) == token("lo", "length") + DONE
        assert [received.body for received in workers[0].received] == [body] * 4


class Body(bytearray):
    """Bytes that can be watched: `bytes` takes no weak reference."""


@pytest.mark.parametrize("size", [100, 400_000], ids=["read on the loop", "read in a thread"])
async def test_nothing_of_the_router_keeps_a_body_whose_answer_has_begun(start_router: StartRouter, size: int) -> None:
    release, begun = asyncio.Event(), asyncio.Event()

    async def streaming(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(token("Hel"))
        await release.wait()
        await connection.chunk(token("lo", "length") + DONE)
        await connection.end_stream()

    async def send(message: Message) -> None:
        if message.get("body"):
            begun.set()

    async with fake_workers(streaming) as workers, start_router(workers) as router:
        await router.ready(1)
        bodies = [Body(b'{"stream": true, "prompt": "' + b"a " * (size // 2) + b'"}')]
        seen = weakref.ref(bodies[0])

        async def receive() -> Message:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [],
        }  # fmt: skip
        answer = asyncio.create_task(router.router.data_plane(scope, receive, send))
        await begun.wait()
        await until(lambda: seen() is None)  # a thread of the executor lets go of it a moment after it has answered
        assert not answer.done()
        release.set()
        await answer
