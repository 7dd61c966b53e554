"""Means over repeated runs, with confidence intervals.

The repeats of a run differ in their seeds and are independent, the requests within a run are not: they wait for one
another. So an interval is computed over repeats, by Student's t, and a single run has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 0.975 quantile of Student's t for 1, 2, ... 30 degrees of freedom."""
MOST_REPEATS = len(T) + 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` runs, and its two-sided 95 % confidence interval; None: there is one run."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def margin(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The estimate of these runs' figures; None: a run has none. At most `MOST_REPEATS` values."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean, n = fmean(known), len(known)
    if n == 1:
        return Estimate(mean, None, None, 1)
    margin = T[n - 2] * stdev(known) / n**0.5
    return Estimate(mean, mean - margin, mean + margin, n)


def difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate | None:
    """The estimate of ours minus theirs, run by run: runs in the same place had the same seed, so that what the seed
    does to both cancels out."""
    pairs = zip(ours, theirs, strict=True)
    return estimate([None if a is None or b is None else a - b for a, b in pairs])
