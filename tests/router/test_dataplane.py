"""What passes through the data port, and where it goes.

Covered: bodies and headers byte for byte, framings of answers, which requests are matched to a cache, the router's own
headers and errors. Not covered: which paths are open (test_paths.py), limits (test_limits.py), failing workers
(test_failures.py, test_retries.py), how prompts become tokens (tests/kvcache).
"""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from kvcache.tokens.tokenizer import Tokenizer
from tests.router.conftest import RunningRouter, StartRouter
from tests.router.fakes import DONE, Connection, Received, completion, fake_workers, good, streaming, token, usage

LONG = "The same beginning of many prompts, long enough for several blocks of sixteen tokens. " * 8


async def test_bodies_and_headers_pass_through_byte_for_byte(start_router: StartRouter) -> None:
    answer = b'{"id" : "cmpl-1",\n  "choices":[], "odd \\u00e9": "\xc3\xa9"}'

    async def script(connection: Connection, request: Received) -> None:
        extra = "X-Own: 1\r\nx-own: 2\r\nconnection: x-hop\r\nx-hop: dropped\r\nserver: theirs\r\n"
        await connection.answer(201, answer, extra=extra)

    body = b'{ "prompt":"hi",  "unknown": [1, 2.50, "\xf0\x9f\x98\x80"], "prompt": "again" }'
    async with fake_workers(script) as workers, start_router(workers) as router:
        response = await router.client.post(
            "/v1/completions?a=b%20c&d",
            content=body,
            headers={
                "authorization": "Bearer secret", "content-type": "application/json", "x-trace": "7",
                "connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers", "accept-encoding": "br",
            },
        )  # fmt: skip
        received = workers[0].received[0]
        assert (response.status_code, response.content) == (201, answer)
        assert response.headers.get_list("x-own") == ["1", "2"]
        assert "x-hop" not in response.headers
        assert response.headers.get_list("server") == ["uvicorn"]
        assert response.headers.get_list("content-length") == [str(len(answer))]
        assert (received.method, received.target, received.body) == ("POST", "/v1/completions?a=b%20c&d", body)
        assert received.header("authorization") == "Bearer secret"
        assert received.header("x-trace") == "7"
        assert received.header("accept-encoding") == "br"
        assert received.header("host") == workers[0].url.removeprefix("http://")
        assert {"x-mine", "te", "connection"}.isdisjoint(name for name, _ in received.headers)


async def test_compressed_answers_stay_compressed(start_router: StartRouter) -> None:
    async def script(connection: Connection, request: Received) -> None:
        await connection.answer(200, gzip.compress(completion("Hello")), extra="content-encoding: gzip\r\n")

    async with fake_workers(script) as workers, start_router(workers) as router:
        response = await router.complete()
        assert response.headers["content-encoding"] == "gzip"
        assert response.json()["choices"][0]["text"] == "Hello"


async def test_a_stream_passes_through_as_it_comes(start_router: StartRouter) -> None:
    release = asyncio.Event()
    rest = [token("two")[:30], token("two")[30:] + token("three", "stop"), DONE]  # pieces need not be events
    script = streaming(token("one"), release=release, rest=rest)
    async with fake_workers(script) as workers, start_router(workers) as router:
        request = {"prompt": "x", "stream": True}
        async with router.client.stream("POST", "/v1/completions", json=request) as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == token("one")
            release.set()
            assert b"".join([piece async for piece in pieces]) == b"".join(rest)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_a_stream_that_ends_within_an_event_passes_through_too(start_router: StartRouter) -> None:
    async with fake_workers(streaming(token("one") + b"data: {")) as workers, start_router(workers) as router:
        assert await router.stream() == token("one") + b"data: {"


async def test_an_answer_without_a_length_ends_with_its_connection(start_router: StartRouter) -> None:
    async def script(connection: Connection, request: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + completion("Hello"))
        connection.writer.close()

    async with fake_workers(script) as workers, start_router(workers) as router:
        assert (await router.complete()).content == completion("Hello")


async def test_interim_answers_are_skipped(start_router: StartRouter) -> None:
    async def script(connection: Connection, request: Received) -> None:
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await good(connection, request)

    async with fake_workers(script) as workers, start_router(workers) as router:
        assert (await router.complete()).content == completion("Hello", cached=16)


async def test_large_answers_pass_through(start_router: StartRouter) -> None:
    body = bytes(range(256)) * 20_000

    async def script(connection: Connection, request: Received) -> None:
        await connection.answer(200, body, "application/octet-stream")

    async with fake_workers(script) as workers, start_router(workers) as router:
        assert (await router.complete()).content == body


async def test_connections_to_workers_are_kept(start_router: StartRouter) -> None:
    connections = set()

    async def script(connection: Connection, request: Received) -> None:
        connections.add(connection.writer)
        await good(connection, request)

    async with fake_workers(script) as workers, start_router(workers) as router:
        for stream in (False, True, False):
            await router.complete(stream=stream)
        assert len(connections) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/responses/resp_1"),
        ("GET", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("HEAD", "/v1/models"),
        ("DELETE", "/v1/files/f%20x"),
    ],
)
async def test_other_paths_of_the_api_go_to_any_worker(start_router: StartRouter, method: str, path: str) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        response = await router.client.request(method, path)
        assert response.status_code == 200
        assert (workers[0].received[0].method, workers[0].received[0].target) == (method, path)


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/health", "/cache/state", "/reset_prefix_cache", "/v1", "/v1/../metrics", "/v1/%2e%2e/x"]
)
async def test_nothing_else_is_served(start_router: StartRouter, path: str) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert answer.endswith(b'\r\n\r\n{"detail":"Not Found"}')
        assert workers[0].received == []


async def test_a_request_id_is_passed_on_or_made(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        response = await router.client.post("/v1/completions", json={}, headers={"x-request-id": "mine-1"})
        assert response.headers.get_list("x-request-id") == ["mine-1"]
        assert workers[0].received[0].header("x-request-id") == "mine-1"
        response = await router.complete()
        assert len(response.headers["x-request-id"]) == 32
        assert workers[0].received[1].header("x-request-id") == response.headers["x-request-id"]


async def test_the_answer_says_who_answered_and_why(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        response = await router.complete(LONG)
        assert response.headers["x-kvcluster-worker"] == workers[0].url
        assert response.headers["x-kvcluster-strategy"] == "cache_aware"
        assert response.headers["x-kvcluster-reason"] == "only_candidate"
        assert response.headers["x-kvcluster-matched-blocks"] == "0"
        assert response.headers["x-kvcluster-attempts"] == "1"


async def _matched(router: RunningRouter, path: str, body: dict[str, object]) -> list[int]:
    found = []
    for _ in range(2):
        response = await router.client.post(path, json=body)
        found.append(int(response.headers["x-kvcluster-matched-blocks"]))
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [LONG, "another"]}),
        ("/v1/completions", {"prompt": list(range(100))}),
        ("/v1/completions", {"prompt": [list(range(100)), [1, 2]]}),
        ("/v1/completions", {"prompt": LONG * 100}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    ],
    ids=["text", "texts", "ids", "lists-of-ids", "long-text", "chat", "chat-parts"],
)
async def test_every_form_of_a_prompt_is_matched(start_router: StartRouter, path: str, body: dict[str, object]) -> None:
    async with fake_workers(good, good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        first, second = await _matched(router, path, body)
        assert first == 0
        assert second >= 5  # assumed present since the first request went there
        assert sorted(len(worker.received) for worker in workers) == [0, 2]


async def test_a_salt_keeps_prompts_apart(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        assert (await _matched(router, "/v1/completions", {"prompt": LONG, "cache_salt": "a"}))[1] > 0
        assert (await _matched(router, "/v1/completions", {"prompt": LONG, "cache_salt": "b"}))[0] == 0


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half an object"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"prompt": 3}', id="number"),
        pytest.param(b'{"prompt": [[]]}', id="empty ids"),
        pytest.param(b'{"prompt": [1, -2]}', id="negative id"),
        pytest.param(b'{"prompt": [1, 99999999999999999999]}', id="huge id"),
        pytest.param(b'{"prompt": "a", "cache_salt": 4}', id="cache salt of a wrong type"),
        pytest.param(b'{"prompt": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"prompt": ' + b"[" * 100_000, id="deep"),
        pytest.param(b'{"model": 5, "prompt": "a", "stream": "yes", "max_tokens": "x"}', id="fields of wrong types"),
        pytest.param(b'{"prompt": "' + b"x" * 2_000_000, id="long and unfinished"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_the_router_cannot_read_is_the_workers_to_refuse(
    start_router: StartRouter, path: str, body: bytes
) -> None:
    async def refuse(connection: Connection, request: Received) -> None:
        await connection.answer(400, b'{"error":"theirs"}')

    async with fake_workers(refuse) as workers, start_router(workers) as router:
        response = await router.client.post(path, content=body)
        assert (response.status_code, response.content) == (400, b'{"error":"theirs"}')
        assert workers[0].received[0].body == body


async def test_metrics_of_a_request(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        await router.stream(LONG)
        await router.complete(LONG)
        assert router.metric("requests_total", code="200", strategy="cache_aware") == 2
        assert router.metric("decisions_total", reason="only_candidate") == 2
        assert router.metric("ttft_seconds_count") == router.metric("predicted_ttft_seconds_count") == 1
        assert router.metric("matched_blocks_count") == 2
        assert router.metric("actual_cached_tokens_total") == 32
        assert router.metric("predicted_cached_tokens_total") > 32  # the second was expected to hit
        assert router.metric("in_flight", worker=workers[0].url) == 0


async def test_cached_tokens_are_found_wherever_the_stream_is_cut(start_router: StartRouter) -> None:
    script = streaming(*(bytes([byte]) for byte in token("x") + usage(48) + DONE))
    async with fake_workers(script) as workers, start_router(workers) as router:
        assert await router.stream(LONG) == token("x") + usage(48) + DONE
        assert router.metric("actual_cached_tokens_total") == 48


async def test_a_worker_cannot_forge_headers_by_its_name(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good) as workers:
        workers[0].serve_feed(tokenizer.fingerprint, name="evil\r\nset-cookie: a=b")
        async with start_router(workers) as router:
            response = await router.complete()
            assert "set-cookie" not in response.headers
            assert response.headers["x-kvcluster-worker"] == "evil??set-cookie:?a=b"


async def test_answers_are_json_where_the_router_answers_itself(start_router: StartRouter) -> None:
    async with start_router() as router:
        response = await router.complete()
        assert response.headers["content-type"] == "application/json"
        assert json.loads(response.content)["error"]["code"] == 503


async def test_a_session_stays_at_its_worker_and_is_explained_there(start_router: StartRouter) -> None:
    body = {"prompt": "hi", "max_tokens": 1}
    session = {"x-session-id": "s"}
    async with (
        fake_workers(good, good, good) as workers,
        start_router(workers, routing_strategy="cache_aware") as router,
    ):
        asked = [await router.client.post("/v1/completions", json=body, headers=session) for _ in range(6)]
        (worker,) = {answer.headers["x-kvcluster-worker"] for answer in asked}
        others = [await router.client.post("/v1/completions", json=body) for _ in range(2)]
        assert worker not in {answer.headers["x-kvcluster-worker"] for answer in others}  # it has worked most
        explained = await router.management.post("/route/explain", json=body, headers=session)
        assert explained.json()["decision"]["worker_id"] == worker
        assert router.metric("sessions") == 1
