"""The same workload under one strategy after another, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from bench.compare import Comparison, keep, keep_raw, report, title_of
from bench.prompts import pooled_hit_rate
from bench.run import progress_bar
from bench.simulation.cluster import ClusterShape, Delays
from bench.simulation.play import Play, asked, play_out, servable
from bench.simulation.scenario import Scenario
from bench.workloads import WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `kvcluster simulate` takes."""

    workload: WorkloadSpec
    delays: Delays = field(default_factory=Delays)
    scenario: Scenario = field(default_factory=Scenario)
    raw: Path | None = None
    """Where the records go: one file for each strategy, one line for each request."""


WITHOUT_TIER = "_no_cpu"
"""Ending of a strategy's name in results without the CPU cache that the workers have in the others."""


def _plays(shape: ClusterShape, strategies: Sequence[str], options: SimulateOptions) -> list[Play]:
    """What to play: each strategy, and if the workers have a CPU cache each without it, too."""
    plays = []
    for strategy in strategies:
        play = Play(shape, strategy, options.workload, options.delays, options.scenario)
        plays.append(play)
        if shape.engine.cpu_blocks:
            without = replace(shape, engine=replace(shape.engine, cpu_blocks=0))
            plays.append(replace(play, shape=without, name=strategy + WITHOUT_TIER))
    return plays


def compare_simulated(
    shape: ClusterShape, strategies: Sequence[str], options: SimulateOptions, out: Path, console: Console
) -> Comparison:
    """Play the workload under each strategy on a cold cluster in virtual time, and report. If the workers have a CPU
    cache, each is played without it, too.

    Requests that no worker takes are errors of the results, and are not part of the ceiling. Raises `WorkloadError`,
    `PromptError` and `ScenarioError`.
    """
    workload = build_workload(options.workload)
    results = []
    for play in _plays(shape, strategies, options):
        play.check()
        name = play.name or play.strategy
        with progress_bar(console, name, workload.count) as progress:
            result, records = play_out(play, progress)
        keep_raw(options.raw, name, records)
        results.append(result)
        keep(result, out, console)
    cluster = options.scenario.extend(shape)
    ceiling = pooled_hit_rate(servable(asked(workload, cluster), cluster), cluster.capacity, shape.engine.block_size)
    return report(results, out, console, title_of(results), ceiling)
