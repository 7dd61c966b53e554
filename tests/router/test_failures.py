"""What the client sees when workers fail: nothing, as long as another worker can answer.

Covered: each way in which a worker can fail, before and after the first byte of its answer, and each timeout. Not
covered: what must not be retried, and ejection (test_retries.py); real processes (test_real_workers.py, tests/e2e); the
pure rules of retries and outliers (tests/router/core).
"""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.router.conftest import MovedClock, StartRouter, http_client, until
from tests.router.fakes import (
    DONE,
    ERROR_EVENT,
    Connection,
    FakeWorker,
    Received,
    Script,
    answering,
    completion,
    fake_workers,
    good,
    resets,
    streaming,
    token,
)

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
ABORT = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}\n\n'


async def half_a_body(connection: Connection, request: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{")
    connection.reset()


async def half_the_headers(connection: Connection, request: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
    connection.reset()


async def not_http(connection: Connection, request: Received) -> None:
    await connection.send(b"220 smtp.example.com ESMTP\r\n\r\n")
    await connection.closed()


async def aborted(connection: Connection, request: Received) -> None:
    await connection.answer(200, completion("cut sho", finish="abort"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failing", "cause"),
    [
        (answering(500), "status_5xx"),
        (answering(502), "status_5xx"),
        (answering(503, kind="ServiceUnavailableError"), "busy"),
        (resets, "broken"),
        (half_the_headers, "broken"),
        (half_a_body, "broken"),
        (not_http, "broken"),
        (streaming(ERROR_EVENT, DONE), "error_event"),
        (streaming(token("", "abort"), DONE), "aborted"),
        (streaming(ROLE, ABORT, DONE), "aborted"),
        (streaming(ROLE + ERROR_EVENT, DONE), "error_event"),
        (streaming(ERROR_EVENT[:20], ERROR_EVENT[20:]), "error_event"),
        (streaming(), "broken"),
        (streaming(end=False), "broken"),
        (streaming(ROLE, end=False), "broken"),
        (streaming(b"data: {", end=False), "broken"),
        (aborted, "aborted"),
    ],
    ids=[
        "500", "502", "503", "reset", "half-headers", "half-body", "not-http", "error-first", "abort-first",
        "abort-after-role", "error-after-role", "error-in-pieces", "empty", "nothing", "role-only", "part-of-event",
        "abort-body",
    ],
)  # fmt: skip
async def test_a_request_that_a_worker_failed_to_answer_is_answered_by_another(
    start_router: StartRouter, failing: Script, cause: str, stream: bool
) -> None:
    async with fake_workers(failing, good) as workers, start_router(workers) as router:
        response = await router.complete(stream=stream)
        assert response.status_code == 200
        text = response.text if stream else response.json()["choices"][0]["text"]
        assert "Hel" in text
        assert response.headers["x-kvcluster-attempts"] == "2"
        assert response.headers["x-kvcluster-worker"] == workers[1].url
        assert router.metric("retries_total", cause=cause) == 1
        assert len(workers[0].received) == len(workers[1].received) == 1
        assert workers[0].received[0].body == workers[1].received[0].body


async def test_a_worker_that_refuses_connections_is_left_out_at_once(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as workers, start_router(workers) as router:
        await workers[0].stop()
        for _ in range(3):
            response = await router.complete()
            assert response.json()["choices"][0]["text"] == "Hello"
        assert router.metric("retries_total", cause="refused") <= 1
        assert router.candidates() == 1


async def test_a_worker_restarted_under_its_address_is_used_again(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, retry_deadline=20) as router:
        await workers[0].stop(reset=True)
        waiting = asyncio.create_task(router.complete())  # no other worker: it waits for this one
        await until(lambda: router.candidates() == 0)
        await workers[0].start()
        assert (await waiting).json()["choices"][0]["text"] == "Hello"
        assert (await router.complete()).status_code == 200


@pytest.mark.parametrize("failing", [resets, answering(500)], ids=["reset", "500"])
async def test_the_same_worker_is_tried_again_when_there_is_no_other(
    start_router: StartRouter, failing: Script
) -> None:
    calls = 0

    async def once(connection: Connection, request: Received) -> None:
        nonlocal calls
        calls += 1
        await (failing if calls == 1 else good)(connection, request)

    async with fake_workers(once) as workers, start_router(workers) as router:
        response = await router.complete()
        assert response.status_code == 200
        assert response.headers["x-kvcluster-attempts"] == "2"


async def test_a_worker_that_dies_in_a_stream_ends_it_with_the_error_event(start_router: StartRouter) -> None:
    failing = streaming(token("Hel"), token("lo") + b'data: {"id":"cmpl-1","choi', end=False)
    async with fake_workers(failing, good) as workers, start_router(workers) as router:
        # The events that were complete, then vLLM's own event for a dead engine: nothing that a client cannot parse.
        assert await router.stream() == token("Hel") + token("lo") + ERROR_EVENT + DONE
        assert router.metric("broken_streams_total", cause="broken") == 1
        assert workers[1].received == []


async def test_an_answer_too_large_to_hold_that_breaks_off_is_seen_as_cut(start_router: StartRouter) -> None:
    async def huge(connection: Connection, request: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9000000\r\n\r\n")
        await connection.send(b"x" * 3_000_000)
        connection.writer.close()

    async with fake_workers(huge) as workers, start_router(workers) as router:
        with pytest.raises(httpx.RemoteProtocolError):
            await router.complete()


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_on_a_worker_that_falls_silent_go_elsewhere(start_router: StartRouter, stream: bool) -> None:
    clock = MovedClock()
    async with fake_workers(good, good) as workers, start_router(workers, clock=clock, stall_timeout=50) as router:
        workers[0].frozen.set()  # it accepts connections (the kernel does) and never answers, on any path
        asked = [asyncio.create_task(router.complete(stream=stream)) for _ in range(8)]
        await until(lambda: sum(task.done() for task in asked) == len(router.router.in_flight) == 4)
        await router.silence(clock, alive=workers[1:])
        responses = await asyncio.gather(*asked)
        assert [response.status_code for response in responses] == [200] * 8
        assert {response.headers["x-kvcluster-worker"] for response in responses} == {workers[1].url}
        assert router.metric("retries_total", cause="stalled") >= 1
        assert router.candidates() == 1


async def test_a_stream_that_stops_is_ended_after_the_idle_timeout(start_router: StartRouter) -> None:
    clock, stalls = MovedClock(), streaming(token("Hel"), release=asyncio.Event())
    async with fake_workers(stalls) as workers, start_router(workers, clock=clock, idle_timeout=50) as router:
        async with router.streaming() as pieces:
            assert await anext(pieces) == token("Hel")
            clock.now += 51
            assert b"".join([piece async for piece in pieces]) == ERROR_EVENT + DONE
        assert router.metric("broken_streams_total", cause="timeout") == 1


async def test_a_live_worker_that_never_answers_is_given_up_after_the_answer_timeout(
    start_router: StartRouter,
) -> None:
    async def never(connection: Connection, request: Received) -> None:
        await connection.closed()

    clock = MovedClock()
    async with fake_workers(never, good) as workers, start_router(workers, clock=clock, answer_timeout=50) as router:
        asked = asyncio.create_task(router.complete())
        await until(lambda: len(workers[0].received) == 1)
        clock.now += 51
        assert (await asked).json()["choices"][0]["text"] == "Hello"
        assert router.metric("retries_total", cause="timeout") == 1


async def test_when_every_worker_fails_the_last_answer_is_passed_on(start_router: StartRouter) -> None:
    async with fake_workers(answering(500), answering(500), good) as workers, start_router(workers) as router:
        response = await router.complete()
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "no"
        assert response.headers["x-kvcluster-attempts"] == "2"
        assert [len(worker.received) for worker in workers] == [1, 1, 0], "two tried it in vain: it may be the cause"


async def test_busy_everywhere_is_503_with_retry_after(start_router: StartRouter) -> None:
    async with fake_workers(answering(503), answering(503)) as workers, start_router(workers) as router:
        response = await router.complete()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1


async def test_an_error_event_from_every_worker_is_passed_on_as_it_came(start_router: StartRouter) -> None:
    async with fake_workers(streaming(ERROR_EVENT, DONE)) as workers, start_router(workers) as router:
        assert await router.stream() == ERROR_EVENT + DONE


async def test_no_worker_is_503_with_retry_after_in_the_shape_of_openai(start_router: StartRouter) -> None:
    async with start_router() as router:
        response = await router.complete()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert error["type"] == "ServiceUnavailableError"
        assert error["code"] == 503
        assert set(error) == {"message", "type", "param", "code"}


async def test_unreachable_workers_are_503(start_router: StartRouter) -> None:
    gone = FakeWorker()
    await gone.start()
    await gone.stop()
    async with start_router([gone], ready=0) as router:
        assert (await router.complete()).status_code == 503


async def test_a_draining_worker_gets_no_new_requests(start_router: StartRouter) -> None:
    async with fake_workers(answering(503), good) as workers, start_router(workers) as router:
        workers[0].health = 503
        assert (await router.complete()).status_code == 200
        await router.ready(1)
        before = len(workers[0].received)
        for _ in range(4):
            assert (await router.complete()).status_code == 200
        assert len(workers[0].received) == before
        workers[0].script, workers[0].health = good, 200
        await router.ready(2)


@pytest.mark.parametrize("status", [400, 409, 413, 422])
async def test_what_a_worker_blames_on_the_client_passes_through(start_router: StartRouter, status: int) -> None:
    async with fake_workers(answering(status, kind="SomeError"), good) as workers, start_router(workers) as router:
        response = await router.complete()
        assert response.status_code == status
        assert response.json()["error"]["type"] == "SomeError"
        assert workers[1].received == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(start_router: StartRouter, stream: bool) -> None:
    cancelled = asyncio.Event()

    async def slow(connection: Connection, request: Received) -> None:
        if stream:
            await connection.begin_stream()
            await connection.chunk(token("Hel"))
        await connection.closed()
        cancelled.set()

    async with fake_workers(slow, good) as workers, start_router(workers) as router:
        async with http_client(router.data.port) as client:
            leaving = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "stream": stream}))
            await until(lambda: len(workers[0].received) == 1)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        async with asyncio.timeout(10):
            await cancelled.wait()
        await until(router.nothing_held)
        await until(lambda: router.metric("requests_total", code="499", strategy="round_robin") == 1)
        assert workers[1].received == []  # nobody waits for the answer: nobody else is asked


async def test_a_client_that_never_reads_is_dropped(start_router: StartRouter) -> None:
    cancelled = asyncio.Event()

    async def endless(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        try:
            while True:
                await connection.chunk(token("x" * 60_000))
        finally:
            cancelled.set()

    async with fake_workers(endless) as workers, start_router(workers, write_timeout=0.2) as router:
        _reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
        body = b'{"prompt":"x","stream":true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        async with asyncio.timeout(20):
            await cancelled.wait()
        await until(router.nothing_held)
        writer.close()
