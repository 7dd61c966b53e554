"""What the router counts of answers, against sums made from the answers that the clients got."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from kvcache.tokens.tokenizer import Tokenizer
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import DONE, ERROR_EVENT, Connection, Received, fake_workers, good, token

MISLEADING = 'said: "usage":{"prompt_tokens":999,"prompt_tokens_details":{"cached_tokens":999}}'
COMMENT = b": keep-alive\n\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


def stated(prompt: int, cached: int | None, *, absent: bool = False) -> dict[str, Any]:
    """A usage; `absent`: without details, as a real vLLM words some."""
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
    return usage if absent else {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


USAGES: Sequence[dict[str, Any] | None] = (
    *(stated(100, 0) for _ in range(9)),
    stated(100, 94),
    stated(31, 16),
    stated(5000, None, absent=True),
    stated(700, None),
    None,
)


def sums(answers: Sequence[bytes]) -> tuple[int, int]:
    """(prompt, cached) tokens of the answers that report both, from nothing but their bytes."""
    prompt = cached = 0
    for answer in answers:
        lines = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")] or [answer]
        usages = [usage for line in lines if (usage := orjson.loads(line).get("usage"))]
        if usages and (found := (usages[-1].get("prompt_tokens_details") or {}).get("cached_tokens")) is not None:
            prompt, cached = prompt + usages[-1]["prompt_tokens"], cached + found
    return prompt, cached


async def scripted(connection: Connection, request: Received) -> None:
    """Answers with the usage that the request names, streamed in pieces of 11 bytes if it asks for a stream."""
    fields = orjson.loads(request.body)
    usage, choice = fields["stated"], {"index": 0, "text": MISLEADING, "finish_reason": "stop"}
    if not fields.get("stream"):
        body: dict[str, Any] = {"choices": [choice], **({"usage": usage} if usage else {})}
        if fields.get("large"):
            body["choices"][0]["logprobs"] = {"top_logprobs": [{'{"usage"': -0.5, "x" * 30: -0.1}] * 40_000}
        await connection.answer(200, orjson.dumps(body))
        return
    events = COMMENT + token(MISLEADING)
    if fields.get("continuous"):
        events += b"data: " + orjson.dumps({"choices": [choice], "usage": stated(7, 3)}) + b"\n\n"
    if usage:
        events += COMMENT + b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\n"
    await connection.begin_stream()
    for at in range(0, len(events + DONE), 11):
        await connection.chunk((events + DONE)[at : at + 11])
    await connection.end_stream()


async def counted(router: RunningRouter) -> tuple[float, float]:
    page = (await router.management.get("/status")).json()
    assert page["prompt_tokens"] == router.metric("reported_prompt_tokens_total")
    assert page["cached_tokens"] == router.metric("actual_cached_tokens_total")
    return page["prompt_tokens"], page["cached_tokens"]


@pytest.mark.parametrize(
    "how",
    [{"stream": False}, {"stream": False, "large": True}, {"stream": True}, {"stream": True, "continuous": True}],
    ids=["whole", "large", "stream", "continuous"],
)
async def test_the_hit_rate_counts_what_the_answers_report(start_router: StartRouter, how: dict[str, bool]) -> None:
    async with fake_workers(scripted, scripted) as workers, start_router(workers) as router:
        answers = [
            (await router.complete("x", stated=usage, **how)).content
            for usage in USAGES
            if usage is not None or not how.get("continuous")
        ]
        expected = sums(answers)
        assert await counted(router) == expected
        assert expected == (1031, 110)


async def test_nine_misses_and_a_hit_are_no_hit_rate_of_94_percent(start_router: StartRouter) -> None:
    async with fake_workers(scripted) as workers, start_router(workers) as router:
        for usage in USAGES[:10]:
            await router.stream("x", stated=usage)
        assert await counted(router) == (1000, 94)


async def test_an_answer_that_is_cut_counts_as_far_as_it_was_passed_on(start_router: StartRouter) -> None:
    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(token("a") + b"data: " + orjson.dumps({"choices": [], "usage": stated(50, 0)}) + b"\n\n")
        connection.reset()

    async with fake_workers(script) as workers, start_router(workers) as router:
        await router.stream()
        assert await counted(router) == (50, 0)


async def test_an_answer_that_no_client_got_counts_on_neither_side(start_router: StartRouter) -> None:
    async def aborted(connection: Connection, request: Received) -> None:
        choice = {"index": 0, "text": "", "finish_reason": "abort"}
        await connection.answer(200, orjson.dumps({"choices": [choice], "usage": stated(100, 90)}))

    async with fake_workers(aborted, good) as workers, start_router(workers) as router:
        answer = (await router.complete()).content
        assert await counted(router) == sums([answer]) == (100, 16)


async def test_what_has_no_prompt_is_no_decision(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        prompted = await router.complete("x")
        for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/v1/embeddings")):
            response = await router.client.request(method, path, content=b"{}")
            assert response.headers["x-kvcluster-worker"] == workers[0].url
            assert "x-kvcluster-matched-blocks" not in response.headers
        assert "x-kvcluster-matched-blocks" in prompted.headers
        page = (await router.management.get("/status")).json()
        assert sum(page["decisions"].values()) == len(page["recent"]) == 1
        assert router.metric("matched_blocks_count") == 1
        assert router.metric("requests_total", code="200", strategy="cache_aware") == 4


# --- comments, and the first token ---


async def test_comments_are_passed_on_as_they_come_and_are_no_first_token(start_router: StartRouter) -> None:
    go_on = asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(COMMENT)
        await connection.chunk(ROLE + COMMENT)
        await go_on.wait()
        await connection.chunk(token("a", "stop") + DONE)
        await connection.end_stream()

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
    stop = asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        while not stop.is_set():
            await connection.chunk(COMMENT)
            await asyncio.sleep(0.01)

    async with (
        fake_workers(script) as workers,
        start_router(workers, answer_timeout=0.1, idle_timeout=0.1) as router,
    ):
        answer = await router.stream()
        stop.set()
        assert answer.startswith(COMMENT)
        assert answer.endswith(ERROR_EVENT + DONE)
        assert router.metric("broken_streams_total", cause="timeout") == 1
        assert router.metric("ttft_seconds_count") == 0


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


# --- who fails fast is not fast ---


@pytest.mark.parametrize("way", ["error event", "status", "reset", "abort"])
async def test_an_engine_that_fails_fast_does_not_look_fast(
    start_router: StartRouter, tokenizer: Tokenizer, way: str
) -> None:
    async def script(connection: Connection, request: Received) -> None:
        if way == "status":
            await connection.answer(500, b"{}")
        elif way == "reset":
            connection.reset()
        elif way == "abort":
            await connection.answer(200, b'{"choices":[{"text":"","finish_reason":"abort"}]}')
        else:
            await connection.begin_stream()
            await connection.chunk(ROLE)
            await connection.chunk(ERROR_EVENT + DONE)
            await connection.end_stream()

    async with fake_workers(script) as (worker,):
        worker.serve_feed(tokenizer.fingerprint)
        async with start_router([worker], retry_attempts=1) as router:
            await until(lambda: len(worker.feeds) == 1)
            for turn in range(12):
                await router.stream([turn, *range(1000)])  # none of it is cached: the prefill is known
            await until(router.nothing_held)
            (status,) = router.router.fleet.workers(router.router.clock())
            assert (status.latency_factor, status.decode_factor) == (1.0, 1.0)
            assert router.metric("ttft_seconds_count") == 0
            assert len(worker.received) >= 12
