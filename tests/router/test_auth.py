"""API keys at the data port: who is let in, what workers and logs learn of a key, and how rates are told and settled.

Covered: both ways to send a key, errors in the shape of each API, CORS, tenant and priority, 429 and rate headers, what
answers and clients that leave cost. Not covered: the file (test_key_file.py), rates over time
(tests/router/core/test_rates.py), what waits for whom among tenants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from router.core.decision import Caller, RouteRequest
from router.server.auth import duration
from router.server.record import RequestRecord
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import DONE, Script, answering, fake_workers, good, streaming, token

KEY = "sk-0123456789abcdef"
BEARER = {"authorization": f"Bearer {KEY}"}
PREFLIGHT = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}
BODY = {"prompt": "a prompt", "max_tokens": 2}

WriteKeys = Callable[..., Path]


@pytest.fixture
def keys(tmp_path: Path) -> WriteKeys:
    """`keys(tenant="a")` writes a file that holds `KEY` with these fields."""

    def write(**fields: object) -> Path:
        path = tmp_path / "keys.yaml"
        path.write_bytes(orjson.dumps({"keys": [{"key": KEY, "tenant": "team-a", **fields}]}))
        return path

    return write


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(BEARER, id="bearer"),
        pytest.param({"authorization": f"bearer  {KEY}"}, id="bearer in another spelling"),
        pytest.param({"x-api-key": KEY}, id="x-api-key"),
        pytest.param({"authorization": "Basic dTpw", "x-api-key": KEY}, id="another scheme beside x-api-key"),
    ],
)
async def test_a_request_with_a_key_is_answered_and_no_worker_sees_the_key(
    start_router: StartRouter, keys: WriteKeys, headers: dict[str, str]
) -> None:
    async with fake_workers(good) as workers, start_router(workers, api_keys_file=keys()) as router:
        response = await router.client.post("/v1/completions", json=BODY, headers={**headers, "x-other": "1"})
        assert response.status_code == 200
        received = dict(workers[0].received[0].headers)
        assert received["x-other"] == "1"
        assert {"authorization", "x-api-key"}.isdisjoint(received)
        assert KEY not in str(received)
        assert not any(name.startswith("x-ratelimit") for name in response.headers)


@pytest.mark.parametrize(
    ("fields", "headers", "why", "code", "message"),
    [
        pytest.param({}, {}, "missing", "invalid_api_key", "No API key was given", id="none"),
        pytest.param({}, {"authorization": KEY}, "missing", "invalid_api_key", "No API key", id="no scheme"),
        pytest.param({}, {"authorization": "Bearer"}, "missing", "invalid_api_key", "No API key", id="an empty one"),
        pytest.param(
            {}, {"authorization": f"Bearer {KEY}x"}, "unknown", "invalid_api_key", "not valid here", id="unknown"
        ),
        pytest.param(
            {}, {"authorization": "Bearer no", "x-api-key": KEY}, "unknown", "invalid_api_key", "not valid",
            id="bearer is stronger",
        ),
        pytest.param(
            {"expires": "2020-01-01T00:00:00Z"}, BEARER, "expired", "expired_api_key", "has expired", id="expired"
        ),
    ],
)  # fmt: skip
async def test_a_request_without_a_valid_key_is_refused_and_told_why(
    start_router: StartRouter,
    keys: WriteKeys,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, object],
    headers: dict[str, str],
    why: str,
    code: str,
    message: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with fake_workers(good) as workers, start_router(workers, api_keys_file=keys(**fields)) as router:
        for path in ("/v1/completions", "/v1/models", "/nowhere"):
            response = await router.client.post(path, json=BODY, headers=headers)
            error = response.json()["error"]
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, None)
            assert message in error["message"]
        assert workers[0].received == []
        assert router.metric("unauthorized_total", why=why) == 3
        assert router.metric("requests_total", code="401") == 3
        assert KEY not in caplog.text


SENT = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\n%b\r\n"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param([b"content-length: 1000"], 401, id="no key"),
        pytest.param([b"content-length: 1000", b"x-api-key: " + KEY.encode()], 429, id="no requests left"),
        pytest.param([b"content-length: 1000", b"expect: 100-continue"], 401, id="a body that waits to be asked for"),
        pytest.param([b"content-length: %d" % 2**40], 401, id="a body beyond the limit"),
        pytest.param([b"transfer-encoding: chunked"], 401, id="a body of unknown length"),
        pytest.param(
            [b"x-api-key: sk-unknown-0123456789", b"upgrade: h2c", b"connection: upgrade"], 401, id="an offer"
        ),
    ],
)
async def test_a_request_is_refused_before_a_byte_of_its_body_has_come(
    start_router: StartRouter, keys: WriteKeys, headers: list[bytes], status: int
) -> None:
    settings = {"api_keys_file": keys(requests_per_minute=1), "clock": MovedClock()}
    async with fake_workers(good) as workers, start_router(workers, ready=0, **settings) as router:
        await router.client.get("/v1/models", headers=BEARER)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
        writer.write(SENT % b"".join(header + b"\r\n" for header in headers))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert router.data.body_bytes == 0
        assert router.metric("requests_total", code=str(status)) == 1
        writer.close()
        await until(lambda: router.data.connections <= 1)


async def test_the_rate_of_a_key_counts_a_request_once(start_router: StartRouter, keys: WriteKeys) -> None:
    settings = {"api_keys_file": keys(requests_per_minute=9), "clock": MovedClock()}
    async with fake_workers(good) as workers, start_router(workers, **settings) as router:
        for left in (8, 7):
            response = await router.client.post("/v1/completions", json=BODY, headers=BEARER)
            assert (response.status_code, response.headers["x-ratelimit-remaining-requests"]) == (200, str(left))


async def test_errors_of_the_messages_api_have_its_shape(start_router: StartRouter, keys: WriteKeys) -> None:
    async with (
        fake_workers(good) as workers,
        start_router(workers, api_keys_file=keys(requests_per_minute=1)) as router,
    ):
        response = await router.client.post("/v1/messages", json={})
        assert (response.status_code, response.json()["type"]) == (401, "error")
        assert response.json()["error"]["type"] == "authentication_error"
        for _ in range(2):
            response = await router.client.post("/v1/messages", json={}, headers={"x-api-key": KEY})
        assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")


@pytest.mark.parametrize("origins", [pytest.param("", id="by a worker"), pytest.param("*", id="by the router")])
async def test_a_preflight_needs_no_key_and_a_refusal_can_be_read_by_the_page(
    start_router: StartRouter, keys: WriteKeys, origins: str
) -> None:
    settings = {"api_keys_file": keys(), "cors_origins": origins}
    async with fake_workers(good) as workers, start_router(workers, **settings) as router:
        response = await router.client.options("/v1/completions", headers=PREFLIGHT)
        assert response.status_code == 200
        assert len(workers[0].received) == (0 if origins else 1)
        assert (await router.client.options("/v1/completions")).status_code == 401
        refusal = await router.client.post("/v1/completions", json=BODY, headers={"origin": "https://a.example.com"})
        assert refusal.status_code == 401
        assert refusal.headers.get("access-control-allow-origin") == (origins or None)


@pytest.mark.parametrize(
    ("fields", "caller"),
    [
        pytest.param({"priority": -1}, Caller("team-a", -1, "chat"), id="a key with a priority"),
        pytest.param({}, Caller("team-a", 7, "chat"), id="a key without"),
    ],
)
async def test_tenant_and_priority_of_the_key_win_over_headers(
    start_router: StartRouter, keys: WriteKeys, fields: dict[str, object], caller: Caller
) -> None:
    stated = {"x-priority": "7", "x-llm-d-inference-fairness-id": "team-b", "x-llm-d-inference-objective": "chat"}
    routes: list[RouteRequest | None] = []

    def read(record: RequestRecord) -> None:
        routes.append(record.route)

    async with fake_workers(good) as workers, start_router(workers, api_keys_file=keys(**fields)) as router:
        router.router.recorder.readers.append(read)
        await router.client.post("/v1/completions", json=BODY, headers={**BEARER, **stated})
        assert routes[0] is not None
        assert routes[0].caller == caller


async def test_without_keys_nothing_is_asked_for_and_what_clients_send_passes(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        assert (await router.client.post("/v1/completions", json=BODY, headers=BEARER)).status_code == 200
        assert workers[0].received[0].header("authorization") == f"Bearer {KEY}"


async def test_requests_beyond_a_keys_rate_are_told_when_to_try_again(
    start_router: StartRouter, keys: WriteKeys
) -> None:
    clock = MovedClock()
    settings = {"api_keys_file": keys(requests_per_minute=2), "clock": clock}
    async with fake_workers(good) as workers, start_router(workers, ready=0, **settings) as router:
        limits = []
        for _ in range(3):
            response = await router.client.get("/v1/models", headers=BEARER)
            limits.append(response.headers.get("x-ratelimit-remaining-requests"))
        assert (response.status_code, limits[:2]) == (429, ["1", "0"])
        assert response.headers.get_list("x-ratelimit-remaining-requests") == ["0"]
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("30", "30000")
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert error["message"] == "Rate limit of this API key reached: 2 requests a minute. Try again in 30s."
        assert router.metric("rate_limited_total", limit="requests") == 1
        assert router.metric("requests_total", code="429") == 1
        clock.now += 30
        response = await router.client.get("/v1/models", headers=BEARER)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "2"
        assert response.headers["x-ratelimit-reset-requests"] == "1m0s"


def tokens_used(router: RunningRouter) -> float:
    """Of the key's tokens, at a time that stands still."""
    assert router.router.keys is not None
    ((_, limiter),) = router.router.keys.keys.values()
    assert limiter.tokens is not None
    return limiter.tokens.capacity - limiter.tokens.level(router.router.clock())


PROMPT = 2
"""Tokens of "a prompt"."""


@pytest.mark.parametrize(
    ("stream", "script", "used"),
    [
        pytest.param(False, answering(500), 0, id="a failure costs nothing"),
        pytest.param(False, good, 100, id="an answer's usage"),
        pytest.param(True, good, 102, id="a stream's usage"),
        pytest.param(True, streaming(token("1"), token("2"), DONE), PROMPT + 3, id="events, where no usage is stated"),
    ],
)
async def test_a_request_costs_what_its_answer_used(
    start_router: StartRouter, keys: WriteKeys, stream: bool, script: Script, used: int
) -> None:
    settings = {"api_keys_file": keys(tokens_per_minute=1000), "retry_attempts": 1, "clock": MovedClock()}
    async with fake_workers(script) as workers, start_router(workers, **settings) as router:
        response = await router.client.post("/v1/completions", json={**BODY, "stream": stream}, headers=BEARER)
        assert response.headers["x-ratelimit-limit-tokens"] == "1000"
        await until(lambda: tokens_used(router) == used)


async def test_a_client_that_leaves_pays_for_its_prompt_and_what_was_generated(
    start_router: StartRouter, keys: WriteKeys
) -> None:
    release = asyncio.Event()
    script = streaming(token("1"), token("2"), token("3"), release=release)
    settings = {"api_keys_file": keys(tokens_per_minute=1000), "clock": MovedClock()}
    async with fake_workers(script) as workers, start_router(workers, **settings) as router:
        request = {**BODY, "stream": True}
        async with router.client.stream("POST", "/v1/completions", json=request, headers=BEARER) as response:
            received = b""
            async for piece in response.aiter_raw():
                received += piece
                if received.count(b"data: ") == 3:
                    break
            assert response.headers["x-ratelimit-remaining-tokens"] == str(1000 - PROMPT)
        await until(lambda: tokens_used(router) == PROMPT + 3)
        release.set()


async def test_a_prompt_beyond_a_keys_tokens_is_refused_before_a_worker_sees_it(
    start_router: StartRouter, keys: WriteKeys
) -> None:
    settings = {"api_keys_file": keys(tokens_per_minute=60), "clock": MovedClock()}
    async with fake_workers(good) as workers, start_router(workers, **settings) as router:
        first = await router.client.post("/v1/completions", json=BODY, headers=BEARER)
        assert first.status_code == 200  # and used 100
        second = await router.client.post("/v1/completions", json=BODY, headers=BEARER)
        assert (second.status_code, second.json()["error"]["type"]) == (429, "tokens")
        assert second.headers["retry-after"] == "41"
        assert second.headers.get_list("x-ratelimit-remaining-tokens") == ["0"]
        assert len(workers[0].received) == 1
        assert router.metric("rate_limited_total", limit="tokens") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        pytest.param(0.0, "0s", id="none"),
        pytest.param(0.1201, "121ms", id="milliseconds"),
        pytest.param(6.5, "7s", id="seconds"),
        pytest.param(59.5, "1m0s", id="a minute"),
        pytest.param(360.0, "6m0s", id="minutes"),
    ],
)
def test_durations_have_openais_form(seconds: float, text: str) -> None:
    assert duration(seconds) == text
