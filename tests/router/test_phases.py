"""How long a decision takes, and which part of it takes how long.

Covered: that the parts add up to the whole, that each is what it says, how many requests are measured, that measured
keys are the same keys. Not covered: how long a decision takes (`python -m bench.micro.index`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.chat.request import ChatOptions
from kvcache.keys import CacheScope, PrefixKeys, pack_tokens
from kvcache.tokens.sources import load
from kvcache.tokens.tokenizer import Tokenizer
from router.core.decision import DecisionPhase
from router.server.measured import MeasuredKeys
from router.server.recorder import MEASURED
from tests.router.conftest import MovedClock, RunningRouter, StartRouter
from tests.router.fakes import Connection, Received, fake_workers, good

FOREVER = dict.fromkeys(("liveness_timeout", "answer_timeout", "idle_timeout", "stall_timeout", "cut_timeout"), 1e6)
PROMPTS = ["short", list(range(400)), "text " * 10_000, list(range(20_000))]
"""The last two are read in a thread, and the last one's keys are computed there."""


def phases(router: RunningRouter, part: str = "sum") -> dict[str, float]:
    return {phase: router.metric(f"decision_phase_seconds_{part}", phase=phase) for phase in DecisionPhase}


async def test_the_phases_of_all_requests_add_up_to_the_time_of_their_decisions(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good, good) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
        async with start_router(workers, routing_strategy="cache_aware") as router:
            router.router.recorder.measured = 1
            for prompt in PROMPTS * 2:
                await router.complete(prompt)
            await router.client.get("/v1/models")
            assert set(phases(router, "count").values()) == {len(PROMPTS) * 2}
            assert all(seconds > 0 for seconds in phases(router).values())
            assert router.metric("decision_seconds_count") == len(PROMPTS) * 2
            assert sum(phases(router).values()) == pytest.approx(router.metric("decision_seconds_sum"))


async def test_the_time_of_the_tokenizer_is_that_of_no_other_phase(start_router: StartRouter) -> None:
    clock = MovedClock()

    class Slow(Tokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            clock.now += 0.25
            return super().encode(text, add_special_tokens=add_special_tokens)

    slow = Slow("gpt2", load("gpt2", ChatOptions()))
    async with fake_workers(good) as workers, start_router(workers, clock=clock, **FOREVER) as router:
        router.router.prompts.tokenizer = slow
        await router.complete("x")
        assert phases(router) == {**dict.fromkeys(DecisionPhase, 0.0), "tokenize": 0.25}
        assert router.metric("decision_seconds_sum") == 0.25


async def test_a_few_requests_are_measured(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        for _ in range(2 * MEASURED + 1):
            await router.complete([1, 2, 3])
        assert set(phases(router, "count").values()) == {3}
        assert router.metric("decision_seconds_count") == 2 * MEASURED + 1


async def test_a_request_that_waits_for_a_worker_is_not_measured(start_router: StartRouter) -> None:
    async def busy(connection: Connection, request: Received) -> None:
        await connection.answer(503, b"{}")

    async with fake_workers(busy, good) as workers, start_router(workers) as router:
        router.router.recorder.measured = 1
        await router.complete()  # sent to both
        assert router.metric("decision_seconds_count") == 1
        for worker in workers:
            router.router.fleet.mark_unreachable(worker.url)
        await router.complete()
        assert router.metric("decision_seconds_count") == 1
        assert set(phases(router, "count").values()) == {1}


@st.composite
def asked(draw: st.DrawFn) -> list[Callable[[PrefixKeys], Any]]:
    depth = st.integers(1, 12)
    calls: list[Callable[[PrefixKeys], Any]] = []
    for kind in draw(st.lists(st.sampled_from(["key", "all", "between", "compute"]), max_size=8)):
        at = draw(depth)
        end = draw(st.integers(at, 12))
        calls.append(
            {
                "key": lambda keys, at=at: keys.key(at),
                "all": lambda keys, at=at: keys.all(at),
                "between": lambda keys, at=at, end=end: list(keys.between(at, end)),
                "compute": lambda keys: keys.compute(),
            }[kind]
        )
    return calls


@settings(max_examples=30, deadline=None)
@given(calls=asked(), image=st.booleans())
def test_measured_keys_are_the_same_and_take_no_more_than_all_the_time(
    calls: list[Callable[[PrefixKeys], Any]], image: bool
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    packed, scope, images = pack_tokens(list(range(100))), CacheScope("salt"), [(17, "image")] if image else []
    plain, measured = PrefixKeys(packed, 8, scope, images), MeasuredKeys(packed, 8, scope, images, clock, 0.5)
    assert [call(measured) for call in calls] == [call(plain) for call in calls]
    assert 0 < measured.hash_seconds <= now
    assert measured.tokenize_seconds == 0.5
