"""The same workload under one strategy after another, simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from bench.comparison import Comparison, Folder, Origin
from bench.experiment import ExperimentOptions, Played, conduct
from bench.prompts import pooled_hit_rate
from bench.run import progress_bar, run_title
from bench.simulation.cluster import ClusterShape, Delays
from bench.simulation.play import Play, asked, play_records, servable
from bench.simulation.scenario import Scenario
from bench.workloads import Workload, WorkloadSpec, build_workload
from router.core.flow import FlowPolicy


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `kvcluster simulate` takes."""

    experiment: ExperimentOptions
    delays: Delays = field(default_factory=Delays)
    scenario: Scenario = field(default_factory=Scenario)
    flow: FlowPolicy | None = None
    """Flow control of the routers; None: requests wait in the engines."""
    raw: Path | None = None
    """Where the records go: one file for each run, one line for each request."""


WITHOUT_TIER = "_no_cpu"
"""Ending of a strategy's name in results without the CPU cache that the workers have in the others."""


def _plays(shape: ClusterShape, strategies: Sequence[str], options: SimulateOptions) -> dict[str, Play]:
    """What to play, by name: each strategy, and if the workers have a CPU cache each without it, too."""
    plays = {}
    for strategy in strategies:
        play = Play(shape, strategy, options.experiment.workload, options.delays, options.scenario, flow=options.flow)
        plays[strategy] = play
        if shape.engine.cpu_blocks:
            without = replace(shape, engine=replace(shape.engine, cpu_blocks=0))
            plays[strategy + WITHOUT_TIER] = replace(play, shape=without, name=strategy + WITHOUT_TIER)
    return plays


def compare_simulated(
    shape: ClusterShape,
    strategies: Sequence[str],
    options: SimulateOptions,
    out: Path,
    console: Console,
    origin: Origin | None = None,
) -> Comparison:
    """Play the workload under each strategy on a cold cluster in virtual time, and report. If the workers have a CPU
    cache, each is played without it, too.

    Requests that no worker takes are errors of the results, and are not part of the ceiling. Raises `WorkloadError`,
    `PromptError` and `ScenarioError`.
    """
    experiment = options.experiment
    experiment.check()
    workload = build_workload(experiment.workload)
    plays = _plays(shape, strategies, options)
    for each in plays.values():
        each.check()

    async def play(contender: str, spec: WorkloadSpec) -> Played:
        count = spec.limit or workload.count
        with progress_bar(console, run_title(contender, spec), count) as progress:
            return play_records(replace(plays[contender], workload=spec), progress)

    folder = Folder(console, out, options.raw, repeated=experiment.repeats > 1)
    outcomes = asyncio.run(conduct(play, list(plays), experiment, folder.keep))
    cluster = options.scenario.extend(shape)

    def ceiling(of: Workload) -> float:
        served = servable(asked(of, cluster), cluster)
        return pooled_hit_rate(served, cluster.capacity, shape.engine.block_size, experiment.counts)

    return folder.publish(outcomes, origin or Origin(), experiment.ceiling(ceiling))
