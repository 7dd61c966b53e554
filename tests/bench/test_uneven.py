"""Engines of different speeds, with and without streams: cache_aware against strategies that know of no speed.

The router is told that all engines are as fast as the profile says. Each client sends the next request when it has its
answer, so a client that waits longer is also served less often.

The times are those of all requests sent, not only of those answered by the end: a strategy that leaves requests waiting
on a slow engine must not look better for it.

Not covered: real engines (docs/real-vllm.md), and engines whose speed changes during a run.
"""

from __future__ import annotations

from functools import cache

import pytest

from bench.prompts import Prompt, prompts
from bench.record import Record
from bench.result import Summary, summary
from bench.simulation import ClusterShape, Delays, Scenario, Simulation
from bench.simulation.scenario import Routers
from bench.workloads import WorkloadSpec, build_workload
from kvcache.profiles import profile
from kvcache.tokens.tokenizer import load_tokenizer
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
SECONDS = 30.0
CLIENTS = 8
"""For each engine."""


@cache
def asked() -> tuple[Prompt, ...]:
    return tuple(prompts(build_workload(WorkloadSpec("rag", limit=1500)), load_tokenizer("gpt2")))


@cache
def play(
    strategy: str, speeds: tuple[float, ...], streamed: float, routers: int = 1
) -> tuple[Simulation, list[Record]]:
    engine = EngineConfig(blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    shape = ClusterShape(len(speeds), engine, LLAMA.latency, LLAMA.model, speeds=speeds)
    scenario = Scenario(routers=Routers(count=routers))
    simulation = Simulation(shape, strategy, Delays(), streamed=streamed, scenario=scenario)
    return simulation, simulation.run_closed(asked(), CLIENTS * len(speeds), SECONDS)


def times(records: list[Record]) -> tuple[Summary, Summary]:
    """TTFT as the engine sent it, and latency."""
    ttft = summary(record.ttft for record in records if record.ttft is not None)
    latency = summary(record.latency for record in records if record.latency is not None)
    assert ttft is not None
    assert latency is not None
    return ttft, latency


MIXES = [(1.0, 0.25), (1.0, 0.1), (1.0, 1.0, 0.5, 0.25)]


@pytest.mark.parametrize("speeds", MIXES, ids=str)
@pytest.mark.parametrize("streamed", [1.0, 0.5, 0.0], ids=["streamed", "mixed", "whole"])
def test_cache_aware_beats_strategies_that_know_of_no_speed(speeds: tuple[float, ...], streamed: float) -> None:
    simulation, ours = play("cache_aware", speeds, streamed)
    ttft, latency = times(simulation.records)
    for strategy in ("least_loaded", "round_robin"):
        # Neither looks at whether an answer is streamed: what they do is the same.
        simulation, theirs = play(strategy, speeds, 1.0)
        their_ttft, their_latency = times(simulation.records)
        assert len(ours) > len(theirs), strategy
        assert ttft.avg < their_ttft.avg, strategy
        assert ttft.p95 < their_ttft.p95, strategy
        assert latency.avg < their_latency.avg, strategy


@pytest.mark.parametrize("streamed", [1.0, 0.0], ids=["streamed", "whole"])
def test_the_speed_of_each_engine_is_learnt_under_load(streamed: float) -> None:
    simulation, records = play("cache_aware", (1.0, 0.25), streamed)
    fast, slow = simulation.fleets[0].workers(max(record.finished or 0.0 for record in records))
    assert slow.latency_factor / fast.latency_factor == pytest.approx(4.0, rel=0.6)
    assert slow.decode_factor / fast.decode_factor > 1.5
    assert fast.latency_factor == pytest.approx(1.0, rel=0.35)
    shares = [sum(record.worker == worker for record in records) for worker in simulation.worker_ids]
    assert shares[1] < 0.3 * shares[0]


@pytest.mark.parametrize("streamed", [1.0, 0.0], ids=["streamed", "whole"])
def test_two_routers_learn_though_neither_is_alone(streamed: float) -> None:
    simulation, records = play("cache_aware", (1.0, 0.25), streamed, routers=2)
    for fleet in simulation.fleets:
        fast, slow = fleet.workers(max(record.finished or 0.0 for record in records))
        assert slow.latency_factor / fast.latency_factor > 2.0
        assert slow.decode_factor / fast.decode_factor > 2.0
    _, theirs = play("least_loaded", (1.0, 0.25), 1.0, routers=2)
    assert len(records) > 1.1 * len(theirs)


@pytest.mark.parametrize("streamed", [1.0, 0.0], ids=["streamed", "whole"])
def test_equal_engines_under_load_are_not_told_apart(streamed: float) -> None:
    simulation, records = play("cache_aware", (1.0, 1.0, 1.0), streamed)
    workers = simulation.fleets[0].workers(max(record.finished or 0.0 for record in records))
    assert len({worker.latency_factor for worker in workers}) == 1
    assert workers[0].latency_factor == pytest.approx(1.0, rel=0.3)
