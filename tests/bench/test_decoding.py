"""Decoding in whole workloads, in virtual time: how evenly answers are spread, what becomes of the time between tokens,
and what a worker gets that joins under load.

Not covered: the figures of one decision (tests/router/core/test_decode_cost.py), and engines of different speeds
(test_uneven.py).
"""

from __future__ import annotations

from functools import cache

import pytest

from bench.prompts import Prompt, prompts
from bench.record import Record
from bench.result import Result, RunInfo, summarise
from bench.simulation import ClusterShape, Delays, Scenario, Simulation
from bench.simulation.scenario import Join
from bench.workloads import WorkloadSpec, build_workload
from kvcache.profiles import profile
from kvcache.tokens.tokenizer import load_tokenizer
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
JOINS = 20.0


@cache
def asked(name: str, limit: int, rate: float | None = None) -> tuple[Prompt, ...]:
    return tuple(prompts(build_workload(WorkloadSpec(name, limit=limit, rate=rate)), load_tokenizer("gpt2")))


def play(
    workload: tuple[Prompt, ...], strategy: str = "cache_aware", workers: int = 4, joining: tuple[float, ...] = ()
) -> tuple[list[Record], Result]:
    engine = EngineConfig(blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    shape = ClusterShape(workers, engine, LLAMA.latency, LLAMA.model)
    events = tuple(Join(type="join", at=at) for at in joining)
    simulation = Simulation(shape, strategy, Delays(), scenario=Scenario(events=events))
    records = simulation.run(workload, lambda sent, answered, failed: None)
    return records, summarise(records, RunInfo(strategy, 0, {}, worker_ids=simulation.worker_ids))


def test_long_answers_behind_one_prompt_are_spread() -> None:
    workload = asked("answers", 120)
    _, ours = play(workload)
    _, theirs = play(workload, "least_loaded")
    assert ours.running_skew is not None
    assert ours.running_skew < 1.16
    assert ours.tpot_seconds is not None
    assert theirs.tpot_seconds is not None
    assert ours.tpot_seconds.p95 < 1.01 * theirs.tpot_seconds.p95
    assert ours.hit_rate == pytest.approx(theirs.hit_rate, abs=0.01)


@pytest.mark.parametrize(("name", "limit"), [("rag", 300), ("chat", 200), ("hot", 200)])
def test_tokens_come_as_fast_as_with_the_fewest_requests_on_each_worker(name: str, limit: int) -> None:
    _, ours = play(asked(name, limit))
    _, theirs = play(asked(name, limit), "least_loaded")
    assert ours.tpot_seconds is not None
    assert theirs.tpot_seconds is not None
    assert ours.tpot_seconds.p95 < 1.01 * theirs.tpot_seconds.p95
    assert ours.hit_rate is not None
    assert theirs.hit_rate is not None
    assert ours.hit_rate > theirs.hit_rate - 0.005


@pytest.mark.parametrize(("name", "rate"), [("hot", 20.0), ("chat", 12.0)])
def test_a_worker_that_joins_gets_its_share(name: str, rate: float) -> None:
    """At least half of the mean in the first 30 s, and conversations that began elsewhere stay where they are."""
    workload = asked(name, int(rate * (JOINS + 25)), rate)
    records, result = play(workload, workers=3, joining=(JOINS,))
    within = [r for r in records if JOINS < r.sent <= JOINS + 30.0]
    assert sum(r.worker == "worker-3" for r in within) > 0.5 * len(within) / 4
    _, before = play(workload, workers=3)
    assert result.hit_rate is not None
    assert before.hit_rate is not None
    assert result.hit_rate > before.hit_rate - 0.01
