"""The simulation: answers, timing by the latency model, the router's view, and what strategies make of workloads.

Not covered: engines of different speeds and several routers (test_uneven.py); agreement with live processes
(tests/e2e).
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from bench.experiment import ExperimentOptions
from bench.predict import agreement, replay
from bench.prompts import Prompt, prompts
from bench.record import Record, read_records
from bench.result import RunInfo, summarise
from bench.simulation import ClusterShape, Delays, Simulation
from bench.simulation.comparison import SimulateOptions, compare_simulated
from bench.workloads import WorkloadSpec, build_workload
from kvcache.feed import Tier
from kvcache.keys import DEFAULT_SCOPE, block_keys
from kvcache.profiles import profile
from kvcache.tokens.tokenizer import load_tokenizer
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
TOKENIZER = load_tokenizer("gpt2")


def shape(workers: int = 4) -> ClusterShape:
    engine = EngineConfig(blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    return ClusterShape(workers, engine, LLAMA.latency, LLAMA.model)


@cache
def asked(name: str, limit: int, rate: float | None = None) -> tuple[Prompt, ...]:
    return tuple(prompts(build_workload(WorkloadSpec(name, limit=limit, rate=rate)), TOKENIZER))


def ignore(sent: int, answered: int, failed: int) -> None:
    pass


def play(
    strategy: str, name: str, limit: int, *, rate: float | None = None, delays: Delays | None = None
) -> tuple[Simulation, list[Record]]:
    simulation = Simulation(shape(), strategy, delays or Delays())
    return simulation, simulation.run(asked(name, limit, rate), ignore)


@pytest.mark.parametrize("strategy", ["cache_aware", "round_robin", "least_loaded", "longest_prefix"])
def test_every_request_is_answered_in_full(strategy: str) -> None:
    simulation, records = play(strategy, "rag", 80)
    assert [r.index for r in records] == list(range(80))
    assert all(r.error is None and r.output_tokens == 32 for r in records)
    assert all(status.in_flight == 0 for status in simulation.fleets[0].workers(1e6))


def test_the_garbage_collector_is_left_as_it_was() -> None:
    before = gc.get_threshold()
    play("round_robin", "hot", 5)
    assert gc.get_threshold() == before


def test_a_simulation_repeats_exactly() -> None:
    assert play("cache_aware", "chat", 80)[1] == play("cache_aware", "chat", 80)[1]


def test_four_ranks_of_two_workers_do_what_four_workers_do() -> None:
    """The same choices, times and hits, under other names."""
    apart = play("cache_aware", "rag", 120)[1]
    simulation = Simulation(replace(shape(2), ranks=2), "cache_aware", Delays())
    together = simulation.run(asked("rag", 120), ignore)
    assert simulation.worker_ids == ["worker-0/0", "worker-0/1", "worker-1/0", "worker-1/1"]
    numbers = {f"worker-{number}": worker_id for number, worker_id in enumerate(simulation.worker_ids)}
    assert [replace(record, worker=numbers[record.worker]) for record in apart] == together


def test_a_lone_request_takes_its_prefill_and_two_hops() -> None:
    _, (record,) = play("cache_aware", "uniform", 1, delays=Delays(network=0.25, feed=0.001))
    assert record.prompt_tokens is not None
    assert record.ttft == pytest.approx(LLAMA.latency.prefill(math.ceil(record.prompt_tokens / 16)) + 0.5)


def test_round_robin_takes_turns() -> None:
    _, records = play("round_robin", "uniform", 40)
    result = summarise(records, RunInfo("round_robin", 0, {}))
    assert [tally.requests for tally in result.workers.values()] == [10, 10, 10, 10]


def test_the_router_sees_every_block_the_engines_hold() -> None:
    simulation, _ = play("cache_aware", "rag", 120)
    for worker in simulation.workers:
        held: dict[bytes, int] = {}
        for key, _ in worker.engine.blocks():
            held[key] = held.get(key, 0) + 1
        assert simulation.fleets[0].held_blocks(worker.url) == held
        assert held


def test_what_is_predicted_with_a_cpu_tier_is_what_engines_report() -> None:
    """Under eviction from both tiers, with one request on its way at a time."""
    tier = {"blocks": 260, "cpu_blocks": 1000, "cpu_block_seconds": 0.0005}
    simulation = Simulation(replace(shape(1), engine=replace(shape().engine, **tier)), "cache_aware", Delays())
    apart = (replace(p, request=replace(p.request, at=20.0 * at)) for at, p in enumerate(asked("chat", 150)))
    records = simulation.run(apart, ignore)
    assert [r.matched_blocks for r in records] == [(r.cached_tokens or 0) // 16 for r in records]
    (worker,) = simulation.workers
    assert worker.engine.stats.loaded_blocks > 200
    assert worker.engine.offloaded_blocks > 1000, "the tier evicts, too"
    (held,) = worker.engine.elsewhere()
    assert simulation.fleets[0].held_blocks(worker.url, Tier.CPU) == dict.fromkeys(held.keys, 1)


def test_cache_aware_beats_the_others_on_rag() -> None:
    results = {}
    for strategy in ("cache_aware", "round_robin", "least_loaded"):
        simulation, records = play(strategy, "rag", 400)
        results[strategy] = summarise(records, RunInfo(strategy, 0, {}, worker_ids=simulation.worker_ids))
    ours = results.pop("cache_aware")
    for other in results.values():
        assert ours.hit_rate > 1.4 * other.hit_rate
        assert ours.ttft_seconds.p50 < 0.6 * other.ttft_seconds.p50


def test_a_hot_prefix_does_not_end_in_one_queue() -> None:
    """More than one worker can carry; longest_prefix sends it all to one."""
    p95 = {}
    for strategy in ("cache_aware", "longest_prefix"):
        _, records = play(strategy, "hot", 300, rate=48)
        figures = summarise(records, RunInfo(strategy, 0, {})).ttft_seconds
        assert figures is not None
        p95[strategy] = figures.p95
    assert p95["cache_aware"] < p95["longest_prefix"] / 5


def test_a_replay_of_a_simulated_run_models_it_exactly() -> None:
    """What separates a live run from its replay is then the live processes' doing."""
    _, records = play("least_loaded", "rag", 120, delays=Delays(network=0.0, feed=0.001))
    figures = agreement(replay(records, asked("rag", 120), shape()))
    assert figures.requests == 120
    assert figures.relative_error_p95 == pytest.approx(0, abs=1e-9)
    assert figures.within == 1.0


def test_simulate_writes_what_compare_writes_and_the_ceiling(tmp_path: Path) -> None:
    options = SimulateOptions(ExperimentOptions(WorkloadSpec("rag", limit=60)), raw=tmp_path / "raw" / "run.jsonl")
    console = Console(record=True, width=140)
    comparison = compare_simulated(shape(), ["cache_aware", "round_robin"], options, tmp_path, console)
    assert comparison.winner == "cache_aware"
    assert comparison.ceiling_hit_rate is not None
    written = orjson.loads((tmp_path / "results_cache_aware.json").read_bytes())
    assert written["config"]["mode"] == "simulated"
    assert written["loadgen"] is None
    assert len(written["workers"]) == 4
    assert len(read_records(tmp_path / "raw" / "run_cache_aware.jsonl")) == 60
    assert "pooled ceiling" in console.export_text()


def test_a_cpu_tier_is_compared_with_none(tmp_path: Path) -> None:
    engine = replace(shape().engine, blocks=260, cpu_blocks=2000, cpu_block_seconds=0.0005)
    played = compare_simulated(
        replace(shape(2), engine=engine),
        ["cache_aware"],
        SimulateOptions(ExperimentOptions(WorkloadSpec("rag", limit=100))),
        tmp_path,
        Console(record=True),
    )
    assert list(played.strategies) == ["cache_aware", "cache_aware_no_cpu"]
    with_tier, without = (played.strategies[name].runs[0] for name in played.strategies)
    assert with_tier["hit_rate"] > without["hit_rate"] + 0.05
    assert with_tier["ttft_p50_seconds"] < without["ttft_p50_seconds"]
    written = [orjson.loads((tmp_path / f"results_{name}.json").read_bytes())["config"] for name in played.strategies]
    assert [config.get("cpu_blocks") for config in written] == [2000, None]


def test_the_keys_of_a_simulation_are_those_of_live_processes() -> None:
    (prompt,) = asked("rag", 1)
    assert prompt.scope == DEFAULT_SCOPE
    assert len(block_keys(prompt.tokens, 16, prompt.scope)) == len(prompt.tokens) // 16
