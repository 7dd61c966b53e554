"""Arrival processes: when requests, or sessions of them, come. They are renewal processes, so the gaps are independent.

The coefficient of variation (CV) of the gaps, their standard deviation over their mean, says how bursty a process is: 0
for constant gaps, 1 for a Poisson process, more for bursts with pauses between them. `vllm bench serve --burstiness B`
draws gamma gaps, too; its B is 1 / CV**2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Process(StrEnum):
    """The distribution of the gaps between arrivals."""

    CONSTANT = "constant"
    POISSON = "poisson"
    GAMMA = "gamma"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An arrival process. Raises `ValueError` for a CV that does not go with it."""

    process: Process = Process.POISSON
    cv: float | None = None
    """Of gamma's gaps, which alone take one; None: 2."""

    def __post_init__(self) -> None:
        if self.cv is None:
            return
        if self.process is not Process.GAMMA:
            raise ValueError(f"a CV is for gamma arrivals; those of {self.process} have the one that they have")
        if not 0.01 <= self.cv <= 100:
            raise ValueError(f"the CV of arrivals must be between 0.01 and 100, not {self.cv:g}")

    def times(self, random: Random, rate: float, start: float = 0.0) -> Iterator[float]:
        """Arrival times, in seconds from `start` on, of an endless stream of `rate` requests a second on average."""
        at = start
        spread = 0.0 if self.process is Process.CONSTANT else (self.cv or 2.0) ** 2
        while True:
            if self.process is Process.POISSON:
                at += random.expovariate(rate)
            elif self.process is Process.GAMMA:
                at += random.gammavariate(1 / spread, spread / rate)
            else:
                at += 1 / rate
            yield at

    def __str__(self) -> str:
        return f"gamma, CV {self.cv or 2.0:g}" if self.process is Process.GAMMA else self.process.value


POISSON = Arrivals()
