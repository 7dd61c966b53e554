"""What browsers ask before a page may use the data port, and what they need to see in answers.

Covered: preflights, headers of workers' answers and of the router's own, HEAD and OPTIONS. Not covered: that browsers
do as the Fetch standard says; the order in which settings are read (test_settings.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx
import pytest

from router.settings import Settings
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter
from tests.router.fakes import Connection, Received, completion, fake_workers, good

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


@pytest.mark.parametrize(
    "origins",
    [
        pytest.param(PAGE, id="one"),
        pytest.param(f"{PAGE},http://localhost:3000", id="two"),
        pytest.param("*", id="any"),
    ],
)
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
    ("ask", "status"),
    [
        pytest.param(_error_without_worker, 503, id="no worker"),
        pytest.param(_error_not_found, 404, id="not found"),
        pytest.param(_error_too_large, 413, id="too large"),
    ],
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
@pytest.mark.parametrize("origins", [pytest.param("", id="none"), pytest.param(PAGE, id="one")])
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
