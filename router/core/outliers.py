"""Outlier detection: which workers fail where others do not, and for how long they are ejected.

After Envoy's: a worker is ejected after `consecutive` failures in a row, or when its success rate over `WINDOW` lies
well below that of the others. Unlike Envoy's the rate is compared with the *other* workers' alone (in a fleet of four
no worker can lie 1.9 standard deviations off a mean that includes it), each ejection lasts twice as long as the last,
and its end admits one request at a time until `PROBES` in a row went well.

Pure: time is passed in as `now`, in seconds. The state is a few counters for each worker.
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
"""Fewer answers than this in the window say nothing about a rate."""
DEVIATIONS = 1.9
"""Standard deviations of the others' rates (Envoy's `success_rate_stdev_factor`)."""
PROBES = 2
"""Consecutive successful answers that end the probing after an ejection."""


class Outcome(Enum):
    """How a worker dealt with a request."""

    GOOD = auto()
    BAD = auto()
    """It failed to answer the request."""
    REFUSED = auto()
    """It refused what another worker answered. This does not count towards its success rate: it may serve other
    requests well (and lack an adapter that others have loaded)."""


class EjectionReason(StrEnum):
    """Label `reason` of `kvcluster_router_ejections_total`."""

    CONSECUTIVE = "consecutive"
    """`OutlierPolicy.consecutive` failures in a row."""
    RATE = "rate"
    """Its success rate was far below the others'."""
    PROBE = "probe"
    """It failed a probe after its ejection."""


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """When a worker is ejected and for how long."""

    consecutive: int = 5
    """Failures in a row; 0: never eject."""
    rate_gap: float = 0.5
    """Least difference between its success rate and that of the others."""
    first_seconds: float = 10.0
    """Duration of the first ejection; each further one lasts twice as long as the last."""
    longest_seconds: float = 300.0
    share: float = 0.5
    """Largest share of the fleet that may be ejected at once; the number is rounded down."""

    def most(self, fleet: int) -> int:
        """How many of `fleet` workers may be ejected at once."""
        return int(fleet * self.share)


@dataclass(frozen=True, slots=True)
class Ejection:
    """Why a worker is ejected, for how many seconds, and until when (on the clock of `now`)."""

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
    """The outcomes of one worker's answers."""

    streak: int = 0
    """Failures since the last success."""
    probes: int = 0
    """Successes since its ejection was over."""
    ejections: int = 0
    """Ejections that still lengthen the next one."""
    ejection: Ejection | None = None
    """The one that is in force, or whose end is being probed; None: neither."""
    well_since: float | None = None
    """When the worker recovered from its last ejection."""
    slots: deque[_Slot] = field(default_factory=deque)

    def count(self, outcome: Outcome, now: float) -> None:
        """Add an answer."""
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
        """Share of good answers in the window; None: there were too few answers to tell."""
        self._expire(now)
        good, bad = sum(slot.good for slot in self.slots), sum(slot.bad for slot in self.slots)
        return good / (good + bad) if good + bad >= VOLUME else None

    def forget_answers(self) -> None:
        """Answers before an ejection say nothing about the time after it."""
        self.streak = self.probes = 0
        self.slots.clear()

    def _expire(self, now: float) -> None:
        while self.slots and self.slots[0].second <= int(now) - WINDOW:
            self.slots.popleft()


def outlying(
    policy: OutlierPolicy, record: Record, others: Iterable[Record], now: float
) -> tuple[EjectionReason, str] | None:
    """Why a worker that has just failed is an outlier; None: it is not."""
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
    """Begin an ejection. Earlier ones lengthen it, unless the worker has been well for as long as they lasted since."""
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
    """The worker passed its probes."""
    record.ejection = None
    record.well_since = now
    record.forget_answers()
