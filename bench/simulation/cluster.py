"""What a simulated cluster consists of: its workers, the delays of its routers, the tokens of its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcache.profiles import LatencyModel, profile
from worker.emulator.engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """What some workers have in common: their engine, and how fast it really is."""

    engine: EngineConfig
    latency: LatencyModel


def kind_of_profile(name: str, engine: EngineConfig) -> WorkerKind:
    """Workers of this profile whose engines are otherwise configured as `engine`. Raises `UnknownProfileError` and
    `EngineConfigError`."""
    gpu = profile(name)
    blocks = gpu.blocks(engine.block_size)
    config = EngineConfig(
        blocks=blocks,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        max_num_seqs=gpu.max_num_seqs,
        max_model_len=min(gpu.max_model_len, gpu.longest_request(blocks, engine.block_size)),
        block_size=engine.block_size,
        max_loras=engine.max_loras,
        sliding_window=gpu.geometry.sliding_window,
        sliding_groups=gpu.geometry.sliding_groups,
    )
    return WorkerKind(config, gpu.latency)


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Further workers of a cluster, which differ from those of the manifest."""

    name: str
    """By which a scenario refers to the group."""
    count: int
    """How many there are from the start; 0: they join later."""
    kind: WorkerKind


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """The cluster that a simulation or a replay emulates, as a manifest describes it."""

    workers: int
    """Those of the manifest."""
    engine: EngineConfig
    latency: LatencyModel
    model: str
    tokenizer: str = "gpt2"
    speeds: tuple[float, ...] = ()
    """By which factor each worker is faster than `latency` says; workers beyond the end of the tuple are as fast as it
    says."""
    ranks: int = 1
    """Engines of each worker."""
    groups: tuple[WorkerGroup, ...] = ()
    """Further workers, numbered after those of the manifest."""

    @property
    def kind(self) -> WorkerKind:
        """That of the manifest's workers. The routers are told its latency for all workers."""
        return WorkerKind(self.engine, self.latency)

    def kinds(self) -> Iterator[WorkerKind]:
        """The kind of each worker that is there from the start, in the order of their numbers."""
        for number in range(self.workers):
            if number < len(self.speeds):
                yield WorkerKind(self.engine, self.latency.scaled(self.speeds[number]))
            else:
                yield self.kind
        for group in self.groups:
            for _ in range(group.count):
                yield group.kind

    @property
    def worker_count(self) -> int:
        """Workers at the start, those of the groups included."""
        return self.workers + sum(group.count for group in self.groups)

    @property
    def capacity(self) -> int:
        """Blocks of all engines together, their copies on the CPU included."""
        return self.ranks * sum(kind.engine.blocks + kind.engine.cpu_blocks for kind in self.kinds())

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request that any worker takes."""
        return max((self.engine.max_model_len, *(group.kind.engine.max_model_len for group in self.groups)))


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays between a router and its workers, one way, in seconds. What the processes themselves add (sockets,
    parsing, tokenising, Python) can be counted in: `bench.predict.overhead` measures it."""

    network: float = 0.001
    """Of a request, and of an answer."""
    feed: float = 0.001
    """From a change of a cache to the router's view of it."""
    token: float = 0.0
    """Of a request, for each token of its prompt: reading and tokenising, in the router and in the worker."""


class SeededTokens:
    """The generated tokens of one request: they differ between requests, so that no prompt hits the blocks of another
    request's answer."""

    __slots__ = ("_seed",)

    def __init__(self, index: int) -> None:
        self._seed = index * 2_654_435_761

    def token(self, index: int) -> int:
        """Never an end-of-sequence token, because the workload sets the lengths."""
        return 512 + ((self._seed + index * 40_503) >> 4) % 16_384
