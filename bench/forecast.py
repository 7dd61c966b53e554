"""Simulated comparison of strategies: the outputs of `bench.compare`, plus the pooled ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.ceiling import pooled_hit_rate
from bench.compare import Comparison, keep, keep_raw, report, title_of
from bench.prompts import prompts
from bench.result import RunInfo, summarise
from bench.run import progress_bar
from bench.shape import ClusterShape
from bench.simulate import Delays, Simulation
from bench.workloads import WorkloadSpec, build_workload
from kvcache.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `kvcluster simulate` takes."""

    workload: WorkloadSpec
    delays: Delays = field(default_factory=Delays)
    raw: Path | None = None
    """Where one line a request goes, one file a strategy."""


def simulate(
    shape: ClusterShape, strategies: Sequence[str], options: SimulateOptions, out: Path, console: Console
) -> Comparison:
    """Plays the workload under each strategy on a cold cluster, in virtual time, and reports.

    Raises `WorkloadError`, `PromptError`, and what the engine says of a request that it cannot run.
    """
    workload = build_workload(options.workload)
    tokenizer = load_tokenizer(shape.tokenizer)
    results = []
    for strategy in strategies:
        simulation = Simulation(shape, strategy, options.delays)
        with progress_bar(console, strategy, workload.count) as progress:
            records = simulation.run(prompts(workload, tokenizer), progress)
        keep_raw(options.raw, strategy, records)
        config = {
            "mode": "simulated",
            "workload": workload.name,
            "model": shape.model,
            "workers": shape.workers,
            "blocks": shape.engine.blocks,
            "network_delay": options.delays.network,
            "feed_delay": options.delays.feed,
            "seconds": "virtual",
            **workload.config,
        }
        info = RunInfo(strategy, workload.seed, config, shape.engine.block_size, simulation.worker_ids)
        results.append(summarise(records, info))
        keep(results[-1], out, console)
    ceiling = pooled_hit_rate(prompts(workload, tokenizer), shape.capacity, shape.engine.block_size)
    return report(results, out, console, title_of(results), ceiling)
