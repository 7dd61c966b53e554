"""How much slower or faster engines are than the latency model predicts, learnt from the times of answers.

Prefill and decode have a correction factor each: a GPU with half the compute may have the same memory bandwidth. Means
are geometric (half as fast and twice as fast weigh the same) and forget exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

SLOWEST, FASTEST = 20.0, 0.05
"""Bounds of a correction factor (observed / predicted seconds)."""
MEMORY = 10.0
"""Weight of the past in a mean, in full samples."""
OUTLIER = 2.0
"""A sample that differs from the mean by more than this factor counts as if it differed by this factor: one stalled
request proves nothing."""
SEPARATE = 1.25
"""A worker that differs from the fleet by less than this factor is taken to be as fast as the fleet."""
CLEAR = math.log(SEPARATE)
EVIDENCE = 4.0
"""Full samples that it takes to tell a worker that differs by `SEPARATE` from the fleet; for larger differences fewer
are enough."""
TOLD_APART = 1.0
"""Full samples that it takes for a worker to have a mean of its own."""
HALF_LIFE = 60.0
"""Seconds after which a difference has faded by half (as a power), if no new samples came. A worker that looks slow
gets little to do, so this is the only way in which it can show that it has recovered."""


class _Mean:
    """Forgetting geometric mean of ratios, as a logarithm."""

    __slots__ = ("log", "mass")

    def __init__(self, mass: float) -> None:
        """The mean starts at 1 with the weight of `mass` full samples."""
        self.log = 0.0
        self.mass = mass

    def add(self, log: float, weight: float) -> None:
        bound = math.log(OUTLIER)
        self.mass = min(self.mass + weight, MEMORY)
        self.log += weight / self.mass * min(max(log - self.log, -bound), bound)


class FleetFactor:
    """Observed / predicted seconds of all workers together: it makes up for wrong constants in a profile."""

    __slots__ = ("_least", "_mean", "_most", "factor")

    def __init__(self) -> None:
        self._mean = _Mean(1.0)
        self.factor = 1.0
        self._least, self._most = math.inf, -math.inf
        """Bounds of the workers' own means, as far as these tell them apart."""

    @property
    def log(self) -> float:
        return self._mean.log

    def add(self, log: float, weight: float) -> None:
        self._mean.add(log, weight)
        self.factor = math.exp(self._mean.log)

    @property
    def even(self) -> bool:
        """Whether no worker can have another factor."""
        log = self._mean.log
        return log - self._least < CLEAR and self._most - log < CLEAR

    def widen(self, own: float) -> None:
        """A worker's own mean is this now."""
        if own < self._least:
            self._least = own
        if own > self._most:
            self._most = own

    def narrow(self, factors: Iterable[WorkerFactor]) -> None:
        """These are all workers' factors: means that they no longer have do not count."""
        self._least, self._most = math.inf, -math.inf
        for factor in factors:
            log, mass = factor.own
            if mass >= TOLD_APART:
                self.widen(log)


class WorkerFactor:
    """Predicted seconds x `factor` = expected seconds on one worker: the fleet's factor, unless it differs clearly.

    Noise must not make equal engines look different: if it did, costs would never tie, and the engine that happened to
    look 2 % faster would get every request of an idle fleet.
    """

    __slots__ = ("_fleet", "_own", "_sampled_at")

    def __init__(self, fleet: FleetFactor) -> None:
        self._fleet = fleet
        self._own = _Mean(0.0)
        self._sampled_at = 0.0

    def factor(self, now: float) -> float:
        """Expected over predicted seconds, between `FASTEST` and `SLOWEST`."""
        own = self._own
        if own.mass < TOLD_APART:
            return self._fleet.factor
        difference = own.log - self._fleet.log
        if own.mass * abs(difference) < EVIDENCE * CLEAR:
            return self._fleet.factor
        difference *= math.exp2((self._sampled_at - now) / HALF_LIFE)
        if abs(difference) < CLEAR:
            return self._fleet.factor
        return _bounded(self._fleet.factor * math.exp(difference))

    @property
    def own(self) -> tuple[float, float]:
        """Logarithm and mass of the worker's own mean."""
        return self._own.log, self._own.mass

    @property
    def estimate(self) -> float:
        """The best estimate, whether the difference is clear or not: samples are compared with it."""
        return math.exp(self._own.log) if self._own.mass >= TOLD_APART else self._fleet.factor

    def observe(self, ratio: float, weight: float, now: float) -> None:
        """Add a sample: observed seconds over those that the latency model predicts, of `weight` 0..1."""
        if weight <= 0.0:
            return
        log = math.log(_bounded(ratio))
        if not self._own.mass:
            self._own.log = self._fleet.log
        self._fleet.add(log, weight)
        self._own.add(log, weight)
        self._sampled_at = now
        if self._own.mass >= TOLD_APART:
            self._fleet.widen(self._own.log)


class FleetCorrection:
    """The factors of all workers of a fleet together."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.prefill = FleetFactor()
        self.decode = FleetFactor()

    @property
    def even(self) -> bool:
        """Whether no worker's factors can differ from these."""
        return self.prefill.even and self.decode.even

    def narrow(self, workers: Collection[WorkerCorrection]) -> None:
        """These are the corrections of all workers."""
        self.prefill.narrow(worker.prefill for worker in workers)
        self.decode.narrow(worker.decode for worker in workers)


class Span(NamedTuple):
    """What an engine did during some time: seconds that the latency model predicts for it, uncorrected.

    A step that prefills and decodes takes the longer of the two, so `decode` counts the steps that only decode.
    """

    prefill: float
    decode: float


class WorkerCorrection:
    """The factors of one worker."""

    __slots__ = ("_full", "decode", "prefill")

    def __init__(self, fleet: FleetCorrection, full: Span) -> None:
        """`full`: a span that makes a full sample of either kind; shorter ones weigh less."""
        self._full = full
        self.prefill = WorkerFactor(fleet.prefill)
        self.decode = WorkerFactor(fleet.decode)

    def seconds(self, span: Span) -> float:
        """How long this worker is expected to take for `span`."""
        return self.prefill.estimate * span.prefill + self.decode.estimate * span.decode

    def observe(self, span: Span, seconds: float, now: float, trust: float = 1.0) -> None:
        """The worker took `seconds` for `span`. `trust` (0..1): how certain it is that it did exactly this.

        The difference from the expected time is attributed to prefill and decode by their shares of that time; spans
        with different shares separate the two.
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
