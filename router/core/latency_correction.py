"""How fast engines really are against what the latency model says, learnt from the times of answers.

Prefill and decode are corrected each by a factor of its own: a GPU with half the compute may have the same memory
bandwidth. Means are geometric (half as fast and twice as fast weigh the same) and exponentially forgetting.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SLOWEST, FASTEST = 20.0, 0.05
"""Bounds of the correction: factors of the predicted time."""
MEMORY = 10.0
"""How many full samples the mean remembers."""
OUTLIER = 2.0
"""A sample further than this factor from the mean counts as this far: one stalled request proves nothing."""
SEPARATE = 1.25
"""A worker that differs from the fleet by less than this factor is taken to be as fast as the fleet."""
EVIDENCE = 4.0
"""So many full samples are needed before a worker that differs just so much is told from the fleet; of one that differs
more, fewer."""
HALF_LIFE = 60.0
"""Seconds in which a difference fades by half (as a power) without new samples. A worker that looks slow gets little
to do, so only this lets it show that it has recovered."""


class _Mean:
    """Forgetting geometric mean of ratios, as a logarithm."""

    __slots__ = ("log", "mass")

    def __init__(self, mass: float) -> None:
        """It starts at 1 with the weight of `mass` full samples."""
        self.log = 0.0
        self.mass = mass

    def take(self, log: float, weight: float) -> None:
        bound = math.log(OUTLIER)
        self.mass = min(self.mass + weight, MEMORY)
        self.log += weight / self.mass * min(max(log - self.log, -bound), bound)


class FleetFactor:
    """Observed / predicted seconds of all workers together: heals wrong constants of a profile."""

    __slots__ = ("_mean", "factor")

    def __init__(self) -> None:
        self._mean = _Mean(1.0)
        self.factor = 1.0

    @property
    def log(self) -> float:
        return self._mean.log

    def take(self, log: float, weight: float) -> None:
        self._mean.take(log, weight)
        self.factor = math.exp(self._mean.log)


class WorkerFactor:
    """Predicted seconds x `factor` = expected seconds on one worker: the fleet's factor, unless it differs clearly.

    Noise must not tell equal engines apart: if it did, costs would never tie, and the engine that happened to look
    2 % faster would get every request of an idle fleet.
    """

    __slots__ = ("_fleet", "_own", "_sampled_at")

    def __init__(self, fleet: FleetFactor) -> None:
        self._fleet = fleet
        self._own = _Mean(0.0)
        self._sampled_at = 0.0

    def factor(self, now: float) -> float:
        """Expected over predicted seconds, between `FASTEST` and `SLOWEST`."""
        difference, clear = self._own.log - self._fleet.log, math.log(SEPARATE)
        if self._own.mass < 1.0 or self._own.mass * abs(difference) < EVIDENCE * clear:
            return self._fleet.factor
        difference *= math.exp2((self._sampled_at - now) / HALF_LIFE)
        if abs(difference) < clear:
            return self._fleet.factor
        return _bounded(self._fleet.factor * math.exp(difference))

    @property
    def estimate(self) -> float:
        """The best guess, clear or not: what samples are held against."""
        return math.exp(self._own.log) if self._own.mass >= 1.0 else self._fleet.factor

    def observe(self, ratio: float, weight: float, now: float) -> None:
        """A sample of `weight` (0..1): seconds observed over those that the latency model predicts."""
        if weight <= 0.0:
            return
        log = math.log(_bounded(ratio))
        if not self._own.mass:
            self._own.log = self._fleet.log
        self._fleet.take(log, weight)
        self._own.take(log, weight)
        self._sampled_at = now


class FleetPace:
    """Of all workers of a fleet together."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.prefill = FleetFactor()
        self.decode = FleetFactor()


class Span(NamedTuple):
    """What an engine did in a stretch of time, in seconds as the latency model has them, uncorrected.

    A step that prefills and decodes takes the longer of the two, so `decode` counts steps that only decode.
    """

    prefill: float
    decode: float


class WorkerPace:
    """How fast one worker is. `full` is a span that makes a full sample of either kind; less of it weighs less."""

    __slots__ = ("_full", "decode", "prefill")

    def __init__(self, fleet: FleetPace, full: Span) -> None:
        self._full = full
        self.prefill = WorkerFactor(fleet.prefill)
        self.decode = WorkerFactor(fleet.decode)

    def seconds(self, span: Span) -> float:
        """How long that is expected to take here."""
        return self.prefill.estimate * span.prefill + self.decode.estimate * span.decode

    def observe(self, span: Span, seconds: float, now: float, trust: float = 1.0) -> None:
        """The worker took `seconds` for `span`. `trust` (0..1): how sure it is that it did just that.

        What the time is longer or shorter than expected is put down to prefill and decode by their shares of it; spans
        of different shares tell the two apart.
        """
        expected = self.seconds(span)
        if expected <= 0.0 or seconds <= 0.0:
            return
        ratio = seconds / expected
        for factor, done, full in (
            (self.prefill, span.prefill, self._full.prefill),
            (self.decode, span.decode, self._full.decode),
        ):
            if done > 0.0 and full > 0.0:
                share = factor.estimate * done / expected
                factor.observe(factor.estimate * ratio, trust * share * min(1.0, done / full), now)


def _bounded(ratio: float) -> float:
    return min(max(ratio, FASTEST), SLOWEST)
