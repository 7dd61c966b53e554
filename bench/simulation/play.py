"""One simulated run, from its description to its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.experiment import Played
from bench.prompts import Prompt, prompts
from bench.record import Record
from bench.result import Result, RunInfo, summarise
from bench.simulation.cluster import ClusterShape, Delays
from bench.simulation.errors import refusal
from bench.simulation.run import Progress, Simulation
from bench.simulation.scenario import Scenario
from bench.workloads import Workload, WorkloadSpec, build_workload
from kvcache.tokens.tokenizer import load_tokenizer
from router.core.flow import FlowPolicy


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
    flow: FlowPolicy | None = None
    """Flow control of the routers; None: requests wait in the engines."""

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
            **({"token_delay": delays.token} if delays.token else {}),
            **({"scenario": scenario} if scenario else {}),
            **({"flow_control": asdict(self.flow)} if self.flow is not None else {}),
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
        if refusal(len(prompt.tokens), prompt.request.max_tokens, longest) is None:
            yield prompt


def play_records(play: Play, progress: Progress = ignore_progress) -> Played:
    """Run it. Raises `WorkloadError`, `PromptError` and `ScenarioError`."""
    workload = build_workload(play.workload)
    shape = play.cluster
    simulation = Simulation(shape, play.strategy, play.delays, scenario=play.scenario, flow=play.flow)
    records = simulation.run(asked(workload, shape), progress)
    info = RunInfo(
        play.name or play.strategy,
        workload.seed,
        play.config(workload),
        shape.engine.block_size,
        simulation.worker_ids,
    )
    return Played(records, info)


def play_out(play: Play, progress: Progress = ignore_progress) -> tuple[Result, list[Record]]:
    """The same, with its result."""
    played = play_records(play, progress)
    return summarise(played.records, played.info), list(played.records)


def result_of(play: Play) -> Result:
    """The result of `play_out`."""
    return play_out(play)[0]
