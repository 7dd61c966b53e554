"""Many decode steps at a time: an engine that is called only when more happens than decoding, and whose tokens nobody
reads, is, to the last bit, one that is called at the end of every step.

Not covered: what a step does (`test_engine_properties`, `test_time`), and that simulations give the same records either
way (`tests/bench`).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.keys import CacheScope, PrefixKeys, pack_tokens
from kvcache.profiles import LatencyModel
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest, RequestRefusedError

LATENCY = LatencyModel(0.0031, 0.00071, 0.0005, 0.0113, 0.00017, 1.3e-6, block_size=4)


class Tokens:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def token(self, index: int) -> int:
        return (self.seed * 31 + index * 7) % 50


def request(number: int, random: Random) -> EngineRequest:
    prompt = [random.randrange(2)] * random.randrange(1, 40)
    scope = CacheScope(adapter=random.choice(["", "a"]))
    keys = PrefixKeys(pack_tokens(prompt), 4, scope)
    keys.compute()
    return EngineRequest(
        str(number), prompt, random.randrange(1, 60), Tokens(number), scope, ignore_eos=random.random() < 0.9,
        keys=random.choice([keys, None]),
    )  # fmt: skip


class Observed:
    """An engine, and what a router would see of it: every event and every load, with its time."""

    def __init__(self, config: EngineConfig, *, leaps: bool) -> None:
        self.engine = Engine(config, LATENCY)
        self.leaps = leaps
        self.seen: list[tuple[float, str]] = []
        self.calls = 0

    def until(self, now: float) -> None:
        while True:
            due = max(self.engine.next_changes(), default=None) if self.leaps else self.engine.next_event()
            if due is None or due > now:
                return
            self.look(due)

    def look(self, now: float) -> None:
        self.calls += 1
        for output in self.engine.advance(now):
            if output.index == 0 or output.finish_reason is not None:
                self.seen.append((output.at, repr(output)))
        events, load = feed_events(self.engine.take_events()), repr(self.engine.load())
        if events or not self.seen or load != self.seen[-1][1]:
            self.seen += [(now, repr(event)) for event in events]
            self.seen.append((now, load))


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_an_engine_that_leaps_is_one_that_steps(seed: int) -> None:
    random = Random(seed)
    config = EngineConfig(
        blocks=random.choice([40, 200]),
        max_num_batched_tokens=random.choice([32, 64]),
        max_num_seqs=random.choice([3, 16]),
        max_model_len=random.choice([80, 160]),
        block_size=4,
        eos_token_id=0,
        cpu_blocks=random.choice([0, 0, 0, 30]),
        cpu_block_seconds=0.001,
        max_loras=random.choice([0, 1]),
    )
    stepping, leaping = Observed(config, leaps=False), Observed(config, leaps=True)
    now = 0.0
    for number in range(random.randrange(1, 12)):
        now += random.choice([0.0, 0.01, random.random(), 3.0])
        new, aborted = request(number, random), str(random.randrange(12)) if random.random() < 0.2 else None
        for each in (stepping, leaping):
            each.until(now)
            each.engine.submit(replace(new, unread=each.leaps and new.ignore_eos), now)
            if aborted is not None:
                each.engine.abort(aborted, now)
            each.look(now)
    for each in (stepping, leaping):
        each.until(1e9)
    assert leaping.seen == stepping.seen
    assert asdict(leaping.engine.stats) == asdict(stepping.engine.stats)
    assert leaping.engine.take_finished() == stepping.engine.take_finished()
    assert leaping.engine.blocks() == stepping.engine.blocks()


def test_a_token_that_nobody_reads_ends_no_output() -> None:
    engine = Observed(EngineConfig(64, 64, 4, 200), leaps=False).engine
    with pytest.raises(RequestRefusedError, match="set ignore_eos"):
        engine.submit(EngineRequest("a", [1], 16, Tokens(1), unread=True), 0.0)


def test_steps_that_only_decode_take_one_call() -> None:
    engine = Observed(EngineConfig(64, 64, 4, 200, block_size=16), leaps=True)
    engine.engine.submit(EngineRequest("a", [1], 160, Tokens(1), ignore_eos=True), 0.0)
    engine.look(0.0)
    engine.until(1e9)
    assert engine.engine.stats.steps == 160
    assert engine.calls < 160 / 4, "a block of 16 tokens takes three calls: it is taken, filled, and in between"
