"""What happens during a simulated run, as YAML: routers, further groups of workers, failures, scaling."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from bench.simulation.cluster import ClusterShape, Delays, WorkerGroup, WorkerKind, kind_of_profile
from kvcache.profiles import UnknownProfileError
from worker.emulator.engine.config import EngineConfigError

WorkerName = Annotated[str, Field(pattern=r"^worker-\d{1,6}$")]
"""`worker-0` is the first of the manifest's; those of groups follow, then those that join, in the order of time."""
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class ScenarioError(ValueError):
    """A scenario cannot be read, or names what is not there. The message says where."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class Dealing(StrEnum):
    """How a Service deals requests to its routers."""

    IN_TURN = "in_turn"
    RANDOM = "random"
    """At random, as kube-proxy does with new connections."""


class RouterDelays(_Part):
    """Delays of one router, in seconds; None: those of the command."""

    network: Seconds | None = None
    """To the workers and back, one way."""
    feed: Seconds | None = None
    """From a change of a cache to the router's view of it."""


class Routers(_Part):
    """The routers of the cluster, which know of one another only by the feeds."""

    count: int = Field(1, ge=1, le=64)
    dealing: Dealing = Dealing.IN_TURN
    seed: int = 0
    """Of random dealing."""
    each: tuple[RouterDelays, ...] = ()
    """Delays of the first, the second, ... router."""

    @model_validator(mode="after")
    def _not_more(self) -> Routers:
        if len(self.each) > self.count:
            raise ValueError(f"each has delays for {len(self.each)} routers, but count is {self.count}")
        return self

    def delays(self, default: Delays) -> list[Delays]:
        """Of every router."""
        given = [*self.each, *[RouterDelays()] * (self.count - len(self.each))]
        return [
            Delays(
                default.network if one.network is None else one.network,
                default.feed if one.feed is None else one.feed,
                default.token,
            )
            for one in given
        ]


class Group(_Part):
    """Workers that differ from those of the manifest; what is left out is as in the manifest."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    count: int = Field(0, ge=0, le=10_000)
    """How many there are from the start; more can join."""
    profile: str | None = None
    blocks: int | None = Field(None, ge=1)
    speed: float = Field(1.0, gt=0, le=1000)
    """How many times as fast as its profile it is. Routers are not told; they find it out."""

    def kind(self, shape: ClusterShape) -> WorkerKind:
        """The workers of the group in this cluster. Raises `ScenarioError`."""
        try:
            kind = shape.kind if self.profile is None else kind_of_profile(self.profile, shape.engine)
            engine = kind.engine
            if self.blocks is not None:
                longest = min(engine.max_model_len, self.blocks * engine.block_size)
                engine = replace(engine, blocks=self.blocks, max_model_len=longest)
        except (UnknownProfileError, EngineConfigError) as error:
            raise ScenarioError(f"workers: group {self.name}: {error}") from None
        return WorkerKind(engine, kind.latency.scaled(self.speed) if self.speed != 1.0 else kind.latency)


class _Event(_Part):
    at: Seconds
    """Since the start."""


class Kill(_Event):
    """A worker's process ends at once; its cache is lost, its address refuses connections."""

    type: Literal["kill"]
    worker: WorkerName
    restart_after: Seconds | None = None
    """Seconds until another process, with an empty cache, starts at its address; None: none does."""


class Freeze(_Event):
    """A worker does nothing for a while (a stopped process, a lost node): nothing is refused, nothing answered."""

    type: Literal["freeze"]
    worker: WorkerName
    seconds: Seconds


class Slow(_Event):
    """A worker's engine runs at another speed for a while."""

    type: Literal["slow"]
    worker: WorkerName
    speed: float = Field(gt=0, le=1000)
    """Times that of its kind; 0.5 is half as fast."""
    seconds: Seconds


class Join(_Event):
    """Workers join, ready to serve, with empty caches."""

    type: Literal["join"]
    count: int = Field(1, ge=1, le=10_000)
    group: str | None = None
    """Whose kind they are; None: the manifest's."""


class Leave(_Event):
    """Workers leave: routers send them no new requests, they finish those that they have, and end."""

    type: Literal["leave"]
    count: int = Field(1, ge=1, le=10_000)
    worker: WorkerName | None = None
    """Which; None: those with the lowest reuse score, as the operator has Kubernetes choose them."""
    grace: Seconds = 600.0
    """Most seconds that they may take to finish; then their connections break."""


class RestartRouter(_Event):
    """A router's process ends at once, and another starts, which knows nothing."""

    type: Literal["restart_router"]
    router: int = Field(ge=0)
    down_for: Seconds = 1.0


class CutFeed(_Event):
    """The cache feed of a worker (None: of all) does not reach a router (None: any) for a while. Requests do."""

    type: Literal["cut_feed"]
    router: int | None = Field(None, ge=0)
    worker: WorkerName | None = None
    seconds: Seconds


Event = Kill | Freeze | Slow | Join | Leave | RestartRouter | CutFeed


class Scenario(_Part):
    """What a simulated run has beside the manifest's workers and the workload."""

    routers: Routers = Field(default_factory=lambda: Routers(count=1))
    workers: tuple[Group, ...] = ()
    """Groups, in the order in which their workers are numbered."""
    events: tuple[Annotated[Event, Field(discriminator="type")], ...] = ()

    def extend(self, shape: ClusterShape) -> ClusterShape:
        """The cluster with the groups of this scenario. Raises `ScenarioError`."""
        groups = tuple(WorkerGroup(group.name, group.count, group.kind(shape)) for group in self.workers)
        if len({group.name for group in groups}) < len(groups):
            raise ScenarioError("workers: two groups have the same name")
        return replace(shape, groups=groups)

    def check(self, shape: ClusterShape) -> None:
        """Raises `ScenarioError` for an event that names a worker, group or router that is not there."""
        there = shape.worker_count
        names = {group.name for group in shape.groups}
        numbered = sorted(enumerate(self.events), key=lambda pair: (pair[1].at, pair[0]))
        for number, event in numbered:
            where = f"events.{number} ({event.type} at {event.at:g} s)"
            worker = getattr(event, "worker", None)
            if worker is not None and int(worker.removeprefix("worker-")) >= there:
                raise ScenarioError(f"{where}: there is no {worker}; the {there} workers by then begin with worker-0")
            router = getattr(event, "router", None)
            if router is not None and router >= self.routers.count:
                raise ScenarioError(f"{where}: there is no router {router}; routers.count is {self.routers.count}")
            group = getattr(event, "group", None)
            if group is not None and group not in names:
                raise ScenarioError(f"{where}: there is no group {group!r}; name it under workers")
            if isinstance(event, Join):
                there += event.count


def parse_scenario(text: str, name: str) -> Scenario:
    """The scenario that a YAML text describes; `name` is that of its file. Raises `ScenarioError`, which names the file
    and the field."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ScenarioError(f"{name}{where}: it is not YAML: {getattr(error, 'problem', None) or error}") from None
    try:
        return Scenario.model_validate({} if value is None else value)
    except ValidationError as error:
        wrong = "; ".join(f"{_path(each['loc'])}: {each['msg']}" for each in error.errors()[:5])
        raise ScenarioError(f"{name}: {wrong}") from None


def read_scenario(file: Path) -> Scenario:
    """The scenario in a file. Raises `ScenarioError`."""
    try:
        return parse_scenario(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot read the scenario {file}: {error}") from None


def _path(loc: tuple[int | str, ...]) -> str:
    return ".".join(map(str, loc)) or "the scenario"
