"""The router's figures, in its metrics and in GET /status, equal sums that the test makes of what it sent and received.

Covered: cached tokens and prompt tokens as answers report them (of each worker, too), decisions, times (on a clock that
the test moves), retries, denials, ejections, broken streams, requests in flight, blocks, and what a failing engine does
to estimates.

Not covered: figures of a whole cluster with real engines, of the dashboard and the command (tests/e2e/test_figures.py),
of feeds (test_feed.py) and of discovery (tests/router/discovery); that docs/metrics.md lists every metric
(tests/e2e/test_metrics_docs.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer
from router.core.fleet import Fleet
from router.core.retries import Denial, FailureCause
from router.metrics import Metrics
from router.sync.liveness import TICK, Ticker
from router.upstream.in_flight import InFlight, UpstreamTimeouts
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.core.support import config
from tests.router.fakes import DONE, ERROR_EVENT, Connection, Received, fake_workers, good, good_after, token
from tests.virtual import CountingLoop, run

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


# --- times ---


async def test_times_to_first_token_add_up(start_router: StartRouter) -> None:
    clock = MovedClock()
    waits, passed_on = [0.5, 0.0, 2.25, 0.125], asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        if b'"stream":true' not in request.body:
            await good(connection, request)
            return
        await connection.begin_stream()
        await connection.chunk(ROLE)
        clock.now += waits[len(worker.received) - 1]
        await connection.chunk(token("a"))
        await passed_on.wait()
        clock.now += 100.0  # what comes after the first token is no part of it
        await connection.chunk(token("b", "stop") + DONE)
        await connection.end_stream()

    timeouts = dict.fromkeys(
        ("liveness_timeout", "answer_timeout", "idle_timeout", "stall_timeout", "cut_timeout"), 1e6
    )
    async with fake_workers(script) as (worker,), start_router([worker], clock=clock, **timeouts) as router:
        for _ in waits:
            passed_on.clear()
            fields = {"prompt": "x", "stream": True}
            async with router.client.stream("POST", "/v1/completions", json=fields) as response:
                async for piece in response.aiter_raw():
                    if b'"a"' in piece:
                        passed_on.set()
        await router.complete()  # an answer that is not a stream has no first token
        assert router.metric("ttft_seconds_count") == len(waits)
        assert router.metric("ttft_seconds_sum") == sum(waits)
        decisions = (await router.management.get("/status")).json()["recent"][1:]
        predicted = [decision["predicted_ttft_seconds"] for decision in decisions]
        assert router.metric("predicted_ttft_seconds_count") == len(waits)
        assert router.metric("predicted_ttft_seconds_sum") == pytest.approx(sum(predicted))


def test_the_delays_of_the_event_loop_add_up() -> None:
    delays = [0.0, 0.5, 0.0, 0.03]
    registry = CollectorRegistry()

    async def main(loop: CountingLoop) -> None:
        held_up = 0.0
        fleet, in_flight = Fleet(config()), InFlight(UpstreamTimeouts(answer=600, idle=600, stall=10, cut=60))
        ticker = Ticker(fleet, in_flight, Metrics(registry), lambda: loop.time() + held_up, lambda url, why: None)
        task = asyncio.create_task(ticker.run())
        for delay in delays:
            await asyncio.sleep(TICK / 2)
            held_up += delay
            await asyncio.sleep(TICK / 2)
        await asyncio.sleep(TICK / 2)
        task.cancel()

    run(main)
    assert registry.get_sample_value("kvcluster_router_loop_lag_seconds_count") == len(delays)
    assert registry.get_sample_value("kvcluster_router_loop_lag_seconds_sum") == pytest.approx(sum(delays))


async def test_a_view_is_as_old_as_the_last_word_of_its_feed(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    clock = MovedClock()
    async with fake_workers(good) as (worker,):
        worker.serve_feed(tokenizer.fingerprint)
        async with start_router([worker], clock=clock, liveness_timeout=1e6) as router:
            await until(lambda: len(worker.feeds) == 1)
            clock.now += 7.5
            assert router.metric("view_age_seconds", worker="w0") == 7.5
            assert (await router.management.get("/status")).json()["view_age_seconds"] == 7.5
            await worker.publish()
            await until(lambda: router.metric("view_age_seconds", worker="w0") == 0.0)


async def test_the_times_of_whole_answers_add_up(start_router: StartRouter) -> None:
    clock = MovedClock()
    times = [0.5, 3.0, 40.0]

    async def script(connection: Connection, request: Received) -> None:
        if b"fails" in request.body:
            await connection.answer(400, b"{}")
            return
        clock.now += times[len(worker.received) - 1]
        await good(connection, request)

    async with fake_workers(script) as (worker,), start_router([worker], clock=clock, liveness_timeout=1e6) as router:
        for at in range(len(times)):
            await router.complete("x", stream=at == 1)
        await router.complete("fails")
        await router.client.post("/v1/embeddings", content=b'"fails"')
        assert router.metric("request_seconds_count") == len(times)
        assert router.metric("request_seconds_sum") == pytest.approx(sum(times))
        below = [router.metric("request_seconds_bucket", le=bound) for bound in ("0.5", "2.5", "5.0", "+Inf")]
        assert below == [1, 1, 2, 3]


# --- each worker ---


async def test_a_worker_that_states_anothers_id_has_series_of_its_own(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good, good) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint, name="same")
        async with start_router(workers) as router:
            await until(lambda: router.metric("feed_refusals_total", reason="duplicate_worker") >= 1)
            for _ in range(4):
                await router.complete()
            names = ["same", next(w.url for w in workers if router.metric("worker_requests_total", worker=w.url))]
            assert [router.metric("worker_requests_total", worker=name) for name in names] == [2, 2]


async def test_the_retry_budget_is_spent_by_retries(start_router: StartRouter) -> None:
    async def broken(connection: Connection, request: Received) -> None:
        connection.reset()

    clock = MovedClock()
    async with (
        fake_workers(broken, good) as workers,
        start_router(
            workers, clock=clock, liveness_timeout=1e6, retry_share=0.5, retry_floor=2, eject_after=0
        ) as router,
    ):
        assert router.metric("retry_budget") == 20
        for _ in range(4):
            await router.complete()
        retries = sum(router.metric("retries_total", cause=cause) for cause in FailureCause)
        assert router.metric("retry_budget") == 20 + 0.5 * 4 - retries < 22
        clock.now += 11
        assert router.metric("retry_budget") == 20


# --- what workers hold ---


async def test_blocks_are_counted_for_each_worker_and_once_in_the_index(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    keys = block_keys(range(16 * 20), 16)
    chain = [(key, keys[at - 1] if at else None) for at, key in enumerate(keys)]
    async with fake_workers(good, good) as workers:
        workers[0].blocks, workers[1].blocks = chain[:13], chain[:20]
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
        async with start_router(workers) as router:
            await until(lambda: all(len(worker.feeds) == 1 for worker in workers))
            for worker in workers:
                assert router.metric("worker_blocks", worker=worker.name) == len(worker.blocks)
            assert router.metric("index_blocks") == len({key for worker in workers for key, _ in worker.blocks})


async def test_requests_in_flight_are_those_that_workers_have_and_have_not_answered(start_router: StartRouter) -> None:
    go_on = asyncio.Event()
    held = good_after(go_on)
    async with fake_workers(held, held) as workers, start_router(workers) as router:
        asked = [asyncio.create_task(router.stream()) for _ in range(5)]
        await until(lambda: sum(len(worker.received) for worker in workers) == 5)
        for worker in workers:
            assert router.metric("in_flight", worker=worker.url) == len(worker.received) > 0
        go_on.set()
        await asyncio.gather(*asked)
        await until(lambda: all(router.metric("in_flight", worker=worker.url) == 0 for worker in workers))


async def test_what_a_worker_was_sent_and_what_its_answers_report_is_counted_for_each(
    start_router: StartRouter,
) -> None:
    async with fake_workers(scripted, scripted, scripted) as workers, start_router(workers) as router:
        answers = [await router.complete("x", stated=usage) for usage in USAGES if usage]
        for worker in workers:
            own = [answer.content for answer in answers if answer.headers["x-kvcluster-worker"] == worker.url]
            figures = ("requests", "prompt_tokens", "cached_tokens")
            told = tuple(router.metric(f"worker_{name}_total", worker=worker.url) for name in figures)
            assert told == (len(worker.received), *sums(own))
        (row,) = [
            row for row in (await router.management.get("/workers")).json()["workers"] if row["url"] == worker.url
        ]
        assert tuple(row[name] for name in figures) == told


async def test_times_to_first_token_are_told_apart_by_what_was_cached(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    prompt = list(range(16 * 20))
    keys = block_keys(prompt, 16)
    chain = [(key, keys[at - 1] if at else None) for at, key in enumerate(keys)]
    async with fake_workers(good) as (worker,):
        worker.blocks = chain[:8]
        worker.serve_feed(tokenizer.fingerprint)
        async with start_router([worker]) as router:
            await until(lambda: len(worker.feeds) == 1)
            # 8 blocks of 9, and of 16; 8 of 17; none of 4.
            half = [prompt[:130], [*prompt[:128], *[1] * 128]]
            asked = [
                *half,
                *([*prompt[:128], *[2 + turn] * 129] for turn in range(3)),
                *([9 + t] * 64 for t in range(4)),
            ]
            matched = [
                int((await router.complete(each, stream=True)).headers["x-kvcluster-matched-blocks"]) for each in asked
            ]
            assert matched == [8] * 5 + [0] * 4
            for use, count in (("hit", 2), ("partial", 3), ("miss", 4)):
                assert router.metric("ttft_seconds_count", cache=use) == count
            assert router.metric("ttft_seconds_count") == len(asked)


# --- requests and failures ---


async def test_requests_prompts_and_decisions_add_up(start_router: StartRouter) -> None:
    prompts = [list(range(length)) for length in (1, 16, 17, 400)]
    async with fake_workers(good, good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        answers = [await router.complete(prompt, stream=number % 2 == 0) for number, prompt in enumerate(prompts * 3)]
        answers += [await router.client.get("/v1/models"), await router.client.get("/nothing")]
        statuses = Counter(str(answer.status_code) for answer in answers)
        for status, count in statuses.items():
            assert router.metric("requests_total", code=status, strategy="cache_aware") == count
        assert router.metric("prompt_tokens_total") == 3 * sum(map(len, prompts))
        decided = [answer.headers for answer in answers if "x-kvcluster-matched-blocks" in answer.headers]
        assert len(decided) == 12
        for reason, count in Counter(headers["x-kvcluster-reason"] for headers in decided).items():
            assert router.metric("decisions_total", reason=reason) == count
        matched = [int(headers["x-kvcluster-matched-blocks"]) for headers in decided]
        assert router.metric("matched_blocks_sum") == sum(matched)
        assert router.metric("predicted_cached_tokens_total") == 16 * sum(matched)


async def test_retries_denials_and_ejections_add_up(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(connection: Connection, request: Received) -> None:
        if number(request) % 2:
            await connection.answer(500, b"{}")
        else:
            await break_off(connection)

    async def flaky(connection: Connection, request: Received) -> None:
        if number(request) in (3, 8, 20):
            await break_off(connection)
        else:
            await good(connection, request)

    async def break_off(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\n")
        connection.reset()

    def number(request: Received) -> int:
        return int(orjson.loads(request.body)["number"])

    async with (
        fake_workers(failing, flaky) as workers,
        start_router(workers, eject_seconds=0.001, retry_attempts=2, retry_floor=1000) as router,
    ):
        answers = [await router.complete("x", number=at) for at in range(30)]
        attempts = [int(answer.headers["x-kvcluster-attempts"]) for answer in answers]
        assert sum(attempts) == sum(len(worker.received) for worker in workers)
        retries = {cause: router.metric("retries_total", cause=cause) for cause in FailureCause}
        assert sum(retries.values()) == sum(attempts) - len(answers) > 0
        assert {cause for cause, count in retries.items() if count} == {FailureCause.BROKEN, FailureCause.STATUS_5XX}
        refused = sum(answer.status_code >= 500 for answer in answers)
        denied = {why: router.metric("retries_denied_total", why=why) for why in Denial}
        assert sum(denied.values()) == refused > 0
        logged = Counter(
            vars(record)["kvcluster_fields"]["reason"] for record in caplog.records if record.msg == "worker_ejected"
        )
        for reason, count in logged.items():
            assert router.metric("ejections_total", reason=reason) == count
        assert logged


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_broken_answers_are_those_that_clients_saw_break(start_router: StartRouter, stream: bool) -> None:
    async def script(connection: Connection, request: Received) -> None:
        if orjson.loads(request.body)["breaks"]:
            if stream:
                await connection.begin_stream()
                await connection.chunk(token("a"))
            else:  # more than is held back until it is complete
                await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n" + b" " * 2_000_000)
            await seen.wait()
            connection.reset()
        else:
            await good(connection, request)

    broken, seen = 0, asyncio.Event()
    async with fake_workers(script) as (worker,), start_router([worker], eject_after=0, eject_rate_gap=1) as router:
        for breaks in (True, False, True, True, False):
            seen.clear()
            fields = {"prompt": "x", "stream": stream, "breaks": breaks}
            body = b""
            try:
                async with router.client.stream("POST", "/v1/completions", json=fields) as response:
                    async for piece in response.aiter_raw():
                        body += piece
                        seen.set()
                broken += ERROR_EVENT in body
            except httpx.RemoteProtocolError:
                broken += 1
        assert broken == 3
        await until(lambda: router.metric("broken_streams_total", cause="broken") == broken)
