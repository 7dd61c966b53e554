"""Outlier detection: which workers fail where others do not, and for how long they are left out.

After Envoy's: a worker is ejected after `consecutive` failures in a row, or when its success rate over `WINDOW` lies
well below that of the others. Unlike Envoy's the rate is compared with the *other* workers' alone (in a fleet of four
no worker can lie 1.9 standard deviations off a mean that includes it), each ejection lasts twice as long as the last,
and its end admits one request at a time until `PROBES` in a row went well.

Pure: time comes in as `now`, seconds. State is a few counters a worker.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from runtime.backoff import Backoff

WINDOW = 10
"""Seconds over which success rates are measured, in slots of a second."""
VOLUME = 20
"""Answers in the window below which a rate says nothing."""
DEVIATIONS = 1.9
"""Standard deviations of the others' rates (Envoy's `success_rate_stdev_factor`)."""
PROBES = 2
"""Answers in a row that end an ejection."""


class Outcome(Enum):
    """How a worker dealt with a request."""

    GOOD = auto()
    BAD = auto()
    """It failed to answer it."""
    REFUSED = auto()
    """It refused what another worker answered. Of no weight for its rate: it may serve other requests well (it lacks an
    adapter that others have loaded)."""


class EjectionReason(StrEnum):
    """Label `reason` of `kvcluster_router_ejections_total`."""

    CONSECUTIVE = "consecutive"
    """So many failures in a row."""
    RATE = "rate"
    """Its success rate was far below the others'."""
    PROBE = "probe"
    """It failed again when its ejection was over."""


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """When a worker is ejected and for how long."""

    consecutive: int = 5
    """Failures in a row; 0: never eject."""
    rate_gap: float = 0.5
    """How much lower its success rate must be than the others' at least."""
    first_seconds: float = 10.0
    """Duration of the first ejection; each further one lasts twice as long."""
    longest_seconds: float = 300.0
    share: float = 0.5
    """Largest share of the fleet that is ejected at once (rounded down)."""

    def most(self, fleet: int) -> int:
        """How many of so many workers may be ejected at once."""
        return int(fleet * self.share)


@dataclass(frozen=True, slots=True)
class Ejection:
    """Why a worker was left out, and until when (in the clock of `now`)."""

    reason: EjectionReason
    why: str
    seconds: float
    until: float


@dataclass(slots=True)
class _Slot:
    second: int
    good: int = 0
    bad: int = 0


@dataclass(slots=True)
class Record:
    """What one worker's answers were like."""

    streak: int = 0
    """Failures since the last success."""
    probes: int = 0
    """Successes since its ejection was over."""
    ejections: int = 0
    """Those that still lengthen the next."""
    ejection: Ejection | None = None
    """The one in force, or being probed."""
    well_since: float | None = None
    """When the last ejection was recovered from."""
    slots: deque[_Slot] = field(default_factory=deque)

    def count(self, outcome: Outcome, now: float) -> None:
        """One more answer."""
        self.streak = 0 if outcome is Outcome.GOOD else self.streak + 1
        if outcome is Outcome.REFUSED:
            return
        self._expire(now)
        if not self.slots or self.slots[-1].second != int(now):
            self.slots.append(_Slot(int(now)))
        if outcome is Outcome.GOOD:
            self.slots[-1].good += 1
        else:
            self.slots[-1].bad += 1

    def rate(self, now: float) -> float | None:
        """Share of good answers in the window; None when there were too few to tell."""
        self._expire(now)
        good, bad = sum(slot.good for slot in self.slots), sum(slot.bad for slot in self.slots)
        return good / (good + bad) if good + bad >= VOLUME else None

    def forget_answers(self) -> None:
        """What it answered before an ejection says nothing about after."""
        self.streak = self.probes = 0
        self.slots.clear()

    def _expire(self, now: float) -> None:
        while self.slots and self.slots[0].second <= int(now) - WINDOW:
            self.slots.popleft()


def outlying(
    policy: OutlierPolicy, record: Record, others: Iterable[Record], now: float
) -> tuple[EjectionReason, str] | None:
    """Why a worker that has just failed is an outlier; None when it is not."""
    if not policy.consecutive:
        return None
    if record.streak >= policy.consecutive:
        return EjectionReason.CONSECUTIVE, f"{record.streak} requests in a row failed there"
    rate = record.rate(now)
    if rate is None:
        return None
    rates = [other for other in (each.rate(now) for each in others) if other is not None]
    if not rates:
        return None
    mean = statistics.fmean(rates)
    if rate < mean - max(policy.rate_gap, DEVIATIONS * statistics.pstdev(rates)):
        return EjectionReason.RATE, f"{rate:.0%} of its answers were good, {mean:.0%} of the others'"
    return None


def eject(policy: OutlierPolicy, record: Record, reason: EjectionReason, why: str, now: float) -> Ejection:
    """Leave the worker out from now on. An ejection is forgotten after as long in good health as it lasted at most."""
    duration = Backoff(policy.first_seconds, policy.longest_seconds)
    if record.well_since is not None:
        healthy = now - record.well_since
        while record.ejections and healthy >= (lasted := duration.delay(record.ejections)):
            healthy -= lasted
            record.ejections -= 1
    record.ejections += 1
    seconds = duration.delay(record.ejections)
    record.ejection = Ejection(reason, why, seconds, now + seconds)
    record.forget_answers()
    return record.ejection


def recover(record: Record, now: float) -> None:
    """The probes went well."""
    record.ejection = None
    record.well_since = now
    record.forget_answers()
