"""Contenders on clusters that are started for them, each with cold caches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from bench.experiment import Play, Played
from bench.foreign import since
from bench.result import WarmUp, WorkerTally
from bench.run import LiveOptions, measure, run_title
from bench.workloads import Workload, WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True)
class Target:
    """A running cluster."""

    url: str
    """Base of the data plane."""
    worker_ids: tuple[str, ...] = ()
    """As the router names workers in its answers. A worker without requests counts only if it is listed here."""
    tallies: Callable[[], Awaitable[Mapping[str, WorkerTally]]] | None = None
    """What the workers have counted so far, if the answers do not name them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """For the result file."""


Launch = Callable[[str], AbstractAsyncContextManager[Target]]
"""Starts a cluster for this contender with cold caches, ready to serve. Leaving the context stops the cluster."""


def cluster_play(launch: Launch, options: LiveOptions, warm_up: WarmUp, console: Console) -> Play:
    """Runs on a cluster that is started for each of them. They raise what `launch` and `measure` raise."""

    async def play(contender: str, spec: WorkloadSpec) -> Played:
        workload = build_workload(spec)
        title = run_title(contender, spec)
        async with launch(contender) as target:
            if target.tallies is None:
                played = await measure(target.url, workload, options, console, contender, target.worker_ids, title)
                tallies = None
            else:
                counted = _Counted(target.tallies, _warm_until(workload, warm_up) / options.speed)
                await counted.begin()
                try:
                    played = await measure(
                        target.url, workload, options, console, contender, target.worker_ids, title, counted.started
                    )
                    tallies = await counted.end()
                finally:
                    counted.stop()
        config = {**played.info.config, **target.config}
        return Played(played.records, replace(played.info, config=config, tallies=tallies))

    return play


def _warm_until(workload: Workload, warm_up: WarmUp) -> float:
    """Emulated seconds from the start to half-way between the last request of the warm-up and the one after it."""
    last = 0.0
    for request in workload.requests() if warm_up else ():
        if warm_up.over(request.index, request.at):
            return (last + request.at) / 2
        last = request.at
    return last


class _Counted:
    """What workers did after the warm-up, by their own counters: without answers that had ended by then, and with those
    that were in progress."""

    def __init__(self, tallies: Callable[[], Awaitable[Mapping[str, WorkerTally]]], warm_up: float) -> None:
        """`warm_up`: wall seconds after the start of the arrivals."""
        self._tallies = tallies
        self._warm_up = warm_up
        self._before: Mapping[str, WorkerTally] = {}
        self._warm: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Count from now on."""
        self._before = await self._tallies()

    def started(self) -> None:
        """The arrivals start now, which may be long after `begin`: prompts were made. Count again after the warm-up."""
        if self._warm_up > 0:
            self._warm = asyncio.create_task(self._begin_again())

    async def _begin_again(self) -> None:
        await asyncio.sleep(self._warm_up)
        self._before = await self._tallies()

    def stop(self) -> None:
        """Wait for the end of the warm-up no longer."""
        if self._warm is not None:
            self._warm.cancel()

    async def end(self) -> dict[str, WorkerTally]:
        """What was done since."""
        if self._warm is not None:
            await self._warm
        return since(await self._tallies(), self._before)
