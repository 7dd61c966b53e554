"""One simulated run from its description to its result, in this process or in several at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from typing import Any

from bench.prompts import Prompt, prompts
from bench.record import Record
from bench.result import Result, RunInfo, summarise
from bench.simulation.cluster import ClusterShape, Delays
from bench.simulation.errors import refusal
from bench.simulation.run import Progress, Simulation
from bench.simulation.scenario import Scenario
from bench.workloads import Workload, WorkloadSpec, build_workload
from kvcache.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Play:
    """All that a simulated run depends on. It can be sent to another process."""

    shape: ClusterShape
    strategy: str
    workload: WorkloadSpec
    delays: Delays = field(default_factory=Delays)
    scenario: Scenario = field(default_factory=Scenario)
    name: str = ""
    """Of the result; empty: that of the strategy."""

    @property
    def cluster(self) -> ClusterShape:
        """With the scenario's groups of workers. Raises `ScenarioError`."""
        return self.scenario.extend(self.shape)

    def check(self) -> None:
        """Raises `ScenarioError`, so that nothing is played in vain."""
        self.scenario.check(self.cluster)

    def config(self, workload: Workload) -> dict[str, Any]:
        """For the result file."""
        shape, delays = self.cluster, self.delays
        scenario = self.scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {
            "mode": "simulated",
            "workload": workload.name,
            "model": shape.model,
            "workers": shape.worker_count,
            **({"ranks": shape.ranks} if shape.ranks > 1 else {}),
            "blocks": shape.engine.blocks,
            **({"cpu_blocks": shape.engine.cpu_blocks} if shape.engine.cpu_blocks else {}),
            "network_delay": delays.network,
            "feed_delay": delays.feed,
            **({"scenario": scenario} if scenario else {}),
            "seconds": "virtual",
            **workload.config,
        }


def ignore_progress(sent: int, answered: int, failed: int) -> None:
    """For a run that nobody watches."""


def asked(workload: Workload, shape: ClusterShape) -> Iterator[Prompt]:
    """The prompts of the workload, read by the cluster's tokenizer. Raises `PromptError`."""
    return prompts(workload, load_tokenizer(shape.tokenizer))


def servable(asked: Iterator[Prompt], shape: ClusterShape) -> Iterator[Prompt]:
    """Those that a worker of the cluster takes."""
    longest = shape.max_model_len
    for prompt in asked:
        if refusal(len(prompt.tokens), prompt.request.max_tokens, longest, streaming=True) is None:
            yield prompt


def play_out(play: Play, progress: Progress = ignore_progress) -> tuple[Result, list[Record]]:
    """Run it. Raises `WorkloadError`, `PromptError` and `ScenarioError`."""
    workload = build_workload(play.workload)
    shape = play.cluster
    simulation = Simulation(shape, play.strategy, play.delays, scenario=play.scenario)
    records = simulation.run(asked(workload, shape), progress)
    info = RunInfo(
        play.name or play.strategy,
        workload.seed,
        play.config(workload),
        shape.engine.block_size,
        simulation.worker_ids,
    )
    return summarise(records, info), records


def _result(play: Play) -> Result:
    return play_out(play)[0]


def play_all(
    plays: Sequence[Play], jobs: int | None = None, done: Callable[[int], None] = lambda played: None
) -> list[Result]:
    """The results of all, in their order, whatever the number of processes. `jobs`: how many processes, None: one for
    each core. `done(n)` is called when n have been played.

    Raises what `play_out` raises. An interrupt ends the processes at once.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(plays))
    results: dict[int, Result] = {}
    if jobs <= 1:
        for number, play in enumerate(plays):
            results[number] = _result(play)
            done(len(results))
        return [results[number] for number in range(len(plays))]
    # Forked processes would inherit the threads' locks of a progress bar.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _die_at_once) as pool:
        futures: dict[Future[Result], int] = {pool.submit(_result, play): n for n, play in enumerate(plays)}
        try:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    results[futures[future]] = future.result()
                done(len(results))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise
    return [results[number] for number in range(len(plays))]


def _die_at_once() -> None:
    """Ctrl-C reaches every process of the terminal: those that simulate end without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
