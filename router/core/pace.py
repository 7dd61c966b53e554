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
SEPARATE = 1.25
"""A worker that differs from the fleet by less than this factor is taken to be as fast as the fleet."""


class _Mean:
    """Forgetting geometric mean of ratios; it starts at 1 with the weight of one full sample."""

    __slots__ = ("_log", "_mass", "value")

    def __init__(self) -> None:
        self._log = 0.0
        self._mass = 1.0
        self.value = 1.0

    def take(self, ratio: float, weight: float) -> None:
        self._mass = min(self._mass + weight, MEMORY)
        self._log += weight / self._mass * (math.log(_bounded(ratio)) - self._log)
        self.value = math.exp(self._log)


class FleetPace:
    """Observed / predicted seconds of all workers together: heals wrong constants of a profile."""

    __slots__ = ("_mean",)

    def __init__(self) -> None:
        self._mean = _Mean()

    @property
    def factor(self) -> float:
        return self._mean.value

    def take(self, ratio: float, weight: float) -> None:
        self._mean.take(ratio, weight)


class WorkerPace:
    """Predicted seconds x `factor` = expected seconds on one worker: the fleet's factor, unless it differs clearly.

    Noise must not tell equal engines apart: if it did, costs would never tie, and the engine that happened to look
    2 % faster would get every request of an idle fleet.
    """

    __slots__ = ("_deviation", "_fleet")

    def __init__(self, fleet: FleetPace) -> None:
        self._fleet = fleet
        self._deviation = _Mean()

    @property
    def factor(self) -> float:
        deviation, fleet = self._deviation.value, self._fleet.factor
        return _bounded(fleet * deviation) if deviation > SEPARATE or deviation * SEPARATE < 1 else fleet

    def observe(self, predicted: float, observed: float, blocks: int) -> None:
        """One clean sample: seconds to the first byte as the latency model has them, as measured, and the blocks
        that the prefill computed."""
        if predicted <= 0 or blocks <= 0:
            return
        weight = min(1.0, blocks / FULL_SAMPLE_BLOCKS)
        ratio = observed / predicted
        self._fleet.take(ratio, weight)
        self._deviation.take(ratio / self._fleet.factor, weight)


def _bounded(ratio: float) -> float:
    return min(max(ratio, FASTEST), SLOWEST)
