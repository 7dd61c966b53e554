"""The cluster that a simulation or a replay emulates."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.profiles import LatencyModel
from worker.emulator.engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """The cluster to simulate: what a manifest says of it."""

    workers: int
    engine: EngineConfig
    latency: LatencyModel
    model: str
    tokenizer: str = "gpt2"
    speeds: tuple[float, ...] = ()
    """How many times as fast as `latency` says each worker is; those beyond the end are as fast as it says."""

    def latency_of(self, worker: int) -> LatencyModel:
        """What the engine of worker `worker` (from 0) takes. The router is told `latency`, of all of them."""
        return self.latency.scaled(self.speeds[worker]) if worker < len(self.speeds) else self.latency

    @property
    def capacity(self) -> int:
        """Blocks of all workers together."""
        return self.workers * self.engine.blocks


class SeededTokens:
    """Generated tokens of one request: different for each request, so that no answer hits another's blocks."""

    __slots__ = ("_seed",)

    def __init__(self, index: int) -> None:
        self._seed = index * 2_654_435_761

    def token(self, index: int) -> int:
        """Never an end-of-sequence token: lengths are the workload's."""
        return 512 + ((self._seed + index * 40_503) >> 4) % 16_384
