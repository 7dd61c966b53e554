"""The highest rate of requests at which a cluster still meets an SLO, by bracketing and bisection.

It is assumed that a cluster that meets the SLO at a rate meets it at every lower one. Where the noise of a run breaks
that near the limit, the result lies within the noise.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import sqrt

from bench.slo import Slo

MOST_STEPS = 12
"""Doublings or halvings of the first rate until the search is given up."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is searched for. Raises `ValueError` for what is no share or tolerance."""

    slo: Slo
    attainment: float = 0.9
    """Least share of the requests that must meet it."""
    tolerance: float = 0.05
    """The search ends when the lowest rate that failed is above the highest that passed by at most this share."""

    def __post_init__(self) -> None:
        if not self.slo:
            raise ValueError("the search for a rate needs an SLO: give --slo-ttft or --slo-tpot or both")
        if not 0 < self.attainment <= 1:
            raise ValueError(f"the attainment must be above 0 and at most 1, not {self.attainment:g}")
        if not 0.001 <= self.tolerance <= 1:
            raise ValueError(f"the tolerance must be between 0.001 and 1, not {self.tolerance:g}")


@dataclass(frozen=True, slots=True)
class Bracket:
    """What a search found. Rates in requests a second."""

    passed: float | None
    """The highest rate that met the SLO; None: none did."""
    failed: float | None
    """The lowest rate that did not; None: all did, so the true limit is higher."""


async def find_rate(meets: Callable[[float], Awaitable[bool]], start: float, tolerance: float) -> Bracket:
    """Ask `meets` at rates from `start` on until the limit is known to within `tolerance`."""
    passed: float | None = None
    failed: float | None = None
    rate = start
    for _ in range(MOST_STEPS + 1):
        if await meets(rate):
            passed = rate
            rate *= 2
        else:
            failed = rate
            rate /= 2
        if passed is not None and failed is not None:
            break
    while passed is not None and failed is not None and failed > passed * (1 + tolerance):
        # The geometric mean: rates differ by factors.
        middle = sqrt(passed * failed)
        if await meets(middle):
            passed = middle
        else:
            failed = middle
    return Bracket(passed, failed)
