"""Streams on their way to the client: comments, the first token, and failures after the first byte.

Covered: what is passed on at once and what is held back, when a stream can no longer go to another worker, and how it
ends when the worker fails then. Not covered: how events are read (test_answer.py), failures before the first byte
(test_failures.py) and the figures (test_figures.py).
"""

from __future__ import annotations

import asyncio

import pytest

from tests.router.conftest import MovedClock, StartRouter, until
from tests.router.fakes import DONE, ERROR_EVENT, Connection, Received, fake_workers, good, streaming, token

COMMENT = b": keep-alive\n\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


async def test_comments_are_passed_on_as_they_come_and_are_no_first_token(start_router: StartRouter) -> None:
    go_on = asyncio.Event()
    script = streaming(COMMENT, ROLE + COMMENT, release=go_on, rest=[token("a", "stop") + DONE])
    async with fake_workers(script) as workers, start_router(workers) as router:
        (worker,) = workers
        request = {"prompt": "x", "stream": True}
        async with router.client.stream("POST", "/v1/completions", json=request) as response:
            assert response.headers["x-kvcluster-worker"] == worker.url, "the head has come"
            pieces = response.aiter_raw()
            got = await anext(pieces)
            while not got.endswith(ROLE + COMMENT):
                got += await anext(pieces)
            assert got == COMMENT + ROLE + COMMENT
            assert router.metric("ttft_seconds_count") == 0
            go_on.set()
            rest = b"".join([piece async for piece in pieces])
        assert rest == token("a", "stop") + DONE
        assert router.metric("ttft_seconds_count") == router.metric("predicted_ttft_seconds_count") == 1


async def test_a_worker_that_only_comments_is_given_up(start_router: StartRouter) -> None:
    """A server writes comments while its engine hangs."""
    clock, more = MovedClock(), asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(COMMENT)
        await more.wait()
        await connection.chunk(COMMENT)
        await connection.closed()

    times = {"answer_timeout": 50, "idle_timeout": 50}
    async with fake_workers(script) as workers, start_router(workers, clock=clock, **times) as router:
        async with router.streaming() as pieces:
            assert await anext(pieces) == COMMENT
            clock.now += 30
            more.set()
            assert await anext(pieces) == COMMENT
            clock.now += 30
            assert b"".join([piece async for piece in pieces]) == ERROR_EVENT + DONE
        assert router.metric("broken_streams_total", cause="timeout") == 1
        assert router.metric("ttft_seconds_count") == 0


async def test_a_messages_stream_that_breaks_off_ends_with_an_error_that_its_clients_see(
    start_router: StartRouter,
) -> None:
    import anthropic  # takes 2 s, which every process that collects this module would pay

    delta = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
    async with fake_workers(streaming(delta, end=False)) as workers, start_router(workers) as router:
        url = f"http://127.0.0.1:{router.data.port}"
        client = anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0)
        stream = await client.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(anthropic.APIStatusError, match="internal_error"):
            assert [event.type async for event in stream] == []
        await client.close()


@pytest.mark.parametrize("ending", ["reset", "error", "end"])
async def test_a_failure_after_a_comment_ends_the_stream_with_an_error(start_router: StartRouter, ending: str) -> None:
    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(COMMENT)
        await asked.wait()
        if ending == "reset":
            connection.reset()
            return
        if ending == "error":
            await connection.chunk(ERROR_EVENT + DONE)
        await connection.end_stream()

    asked = asyncio.Event()
    async with fake_workers(script, good) as workers, start_router(workers) as router:
        async with router.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == COMMENT
            asked.set()
            assert b"".join([piece async for piece in pieces]) == ERROR_EVENT + DONE
        assert workers[1].received == [], "its client has been told who answers"
        await until(
            lambda: sum(router.metric("broken_streams_total", cause=cause) for cause in ("broken", "error_event")) == 1
        )
        assert router.metric("ttft_seconds_count") == 0


async def test_an_error_within_a_stream_is_a_broken_answer(start_router: StartRouter) -> None:
    begun = asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(token("a"))
        await begun.wait()
        await connection.chunk(ERROR_EVENT + DONE)
        await connection.end_stream()

    async with fake_workers(script) as workers, start_router(workers) as router:
        async with router.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == token("a")
            begun.set()
            assert b"".join([piece async for piece in pieces]) == ERROR_EVENT + DONE
        await until(lambda: router.metric("broken_streams_total", cause="error_event") == 1)
