"""How fast engines really are against what the latency model says, learnt from first bytes.

The mean is geometric (half as fast and twice as fast weigh the same) and exponentially forgetting.
"""

from __future__ import annotations

import math

SLOWEST, FASTEST = 20.0, 0.05
"""Bounds of the correction: factors of the predicted time."""
MEMORY = 10.0
"""How many full samples the mean remembers."""
FULL_SAMPLE_BLOCKS = 32
"""A prefill of this many blocks is a full sample; a shorter one, where constant overheads show, weighs less."""
OUTLIER = 2.0
"""A sample further than this factor from the mean counts as this far: one stalled request proves nothing."""
SEPARATE = 1.25
"""A worker that differs from the fleet by less than this factor is taken to be as fast as the fleet."""
EVIDENCE = 3.0
"""So many full samples are needed before a worker is told from the fleet."""
HALF_LIFE = 60.0
"""Seconds in which a difference fades by half (as a power) without new samples. A worker that looks slow gets little
to do, so only this lets it show that it has recovered."""


class _Mean:
    """Forgetting geometric mean of ratios; it starts at 1 with the weight of one full sample."""

    __slots__ = ("log", "mass")

    def __init__(self) -> None:
        self.log = 0.0
        self.mass = 1.0

    def take(self, log: float, weight: float) -> None:
        bound = math.log(OUTLIER)
        self.mass = min(self.mass + weight, MEMORY)
        self.log += weight / self.mass * min(max(log - self.log, -bound), bound)


class FleetPace:
    """Observed / predicted seconds of all workers together: heals wrong constants of a profile."""

    __slots__ = ("_mean", "factor")

    def __init__(self) -> None:
        self._mean = _Mean()
        self.factor = 1.0

    def take(self, ratio: float, weight: float) -> None:
        self._mean.take(math.log(_bounded(ratio)), weight)
        self.factor = math.exp(self._mean.log)


class WorkerPace:
    """Predicted seconds x `factor` = expected seconds on one worker: the fleet's factor, unless it differs clearly.

    Noise must not tell equal engines apart: if it did, costs would never tie, and the engine that happened to look
    2 % faster would get every request of an idle fleet.
    """

    __slots__ = ("_deviation", "_fleet", "_sampled_at")

    def __init__(self, fleet: FleetPace) -> None:
        self._fleet = fleet
        self._deviation = _Mean()
        self._sampled_at = 0.0

    def factor(self, now: float) -> float:
        """Expected over predicted seconds, between `FASTEST` and `SLOWEST`."""
        if self._deviation.mass < 1 + EVIDENCE:
            return self._fleet.factor
        deviation = self._deviation.log * self._fading(now)
        if abs(deviation) < math.log(SEPARATE):
            return self._fleet.factor
        return _bounded(self._fleet.factor * math.exp(deviation))

    def observe(self, predicted: float, observed: float, blocks: int, now: float) -> None:
        """One clean sample: seconds to the first byte as the latency model has them, as measured, and the blocks
        that the prefill computed."""
        if predicted <= 0 or blocks <= 0:
            return
        weight = min(1.0, blocks / FULL_SAMPLE_BLOCKS)
        ratio = observed / predicted
        self._fleet.take(ratio, weight)
        self._deviation.log *= self._fading(now)
        self._deviation.take(math.log(_bounded(ratio / self._fleet.factor)), weight)
        self._sampled_at = now

    def _fading(self, now: float) -> float:
        return math.exp2((self._sampled_at - now) / HALF_LIFE)


def _bounded(ratio: float) -> float:
    return min(max(ratio, FASTEST), SLOWEST)
