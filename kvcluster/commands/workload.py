"""What `bench`, `compare` and `simulate` share: the options of the workload, and the strategies to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import WorkloadSpec
from controller.api.load import override
from controller.api.model import KVCluster, Strategy


class NoStrategyError(ValueError):
    """`--strategies` is empty."""


@dataclass(frozen=True, slots=True)
class Load:
    """The options of the workload. None stands for the workload's own default."""

    workload: str
    trace: Path | None
    limit: int | None
    rate: float | None
    seed: int

    def spec(self) -> WorkloadSpec:
        """The workload asked for."""
        return WorkloadSpec(self.workload, self.seed, self.limit, self.rate, self.trace)


def with_strategy(manifest: KVCluster, strategy: str) -> KVCluster:
    """The manifest with another strategy. Raises `ManifestError`."""
    return override(manifest, {("spec", "router", "strategy"): strategy}, f"{manifest.name} with --strategies")


def checked_strategies(manifest: KVCluster, given: Sequence[str]) -> list[str]:
    """The strategies that are named, each once and each valid. Raises `NoStrategyError` or `ManifestError`."""
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise NoStrategyError(f"--strategies names no strategy; use some of: {', '.join(Strategy)}")
    for name in names:
        with_strategy(manifest, name)
    return names
