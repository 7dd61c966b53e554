"""Contenders on clusters that are started for them, each with cold caches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from bench.experiment import Play, Played
from bench.result import WorkerTally
from bench.run import LiveOptions, measure, run_title
from bench.workloads import WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True)
class Target:
    """A running cluster."""

    url: str
    """Base of the data plane."""
    worker_ids: tuple[str, ...] = ()
    """As the router names workers in its answers. A worker without requests counts only if it is listed here."""
    tallies: Callable[[], Awaitable[Mapping[str, WorkerTally]]] | None = None
    """What the workers counted, if the answers do not name them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """For the result file."""


Launch = Callable[[str], AbstractAsyncContextManager[Target]]
"""Starts a cluster for this contender with cold caches, ready to serve. Leaving the context stops the cluster."""


def cluster_play(launch: Launch, options: LiveOptions, console: Console) -> Play:
    """Runs on a cluster that is started for each of them. They raise what `launch` and `measure` raise."""

    async def play(contender: str, spec: WorkloadSpec) -> Played:
        workload = build_workload(spec)
        async with launch(contender) as target:
            title = run_title(contender, spec)
            played = await measure(target.url, workload, options, console, contender, target.worker_ids, title)
            tallies = await target.tallies() if target.tallies is not None else None
        config = {**played.info.config, **target.config}
        return Played(played.records, replace(played.info, config=config, tallies=tallies))

    return play
