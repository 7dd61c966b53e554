"""How well the workers of a fleet answer: who is paused, ejected, probed. The members' circuits are moved from here."""

from __future__ import annotations

from collections.abc import Collection

from router.core.config import FleetConfig
from router.core.membership import Intake
from router.core.outliers import PROBES, Ejection, EjectionReason, Outcome, eject, outlying, recover
from router.core.worker import Member
from router.core.worker_state import Circuit, Contact, Event

FIRST_PAUSE = 1.0
"""Seconds for which a worker that turns requests away, and says not for how long, is left alone; doubled each time."""

_BY_INTAKE = {Intake.OPEN: Event.OPENED, Intake.DRAINING: Event.DRAINS, Intake.CLOSED: Event.CLOSES}


class Health:
    """Invariant, after every call: at most `policy.share` of the workers that live and take requests is ejected."""

    def __init__(self, config: FleetConfig, members: Collection[Member]) -> None:
        self._longest_pause = config.longest_pause
        self._policy = config.outliers
        self._members = members

    def set_intake(self, member: Member, intake: Intake) -> None:
        """What the worker does with new requests."""
        member.moves(_BY_INTAKE[intake])
        self.fleet_shrank()

    def answered(self, member: Member, outcome: Outcome, now: float) -> Ejection | None:
        """See `Fleet.answered`."""
        record = member.record
        record.count(outcome, now)
        if outcome is Outcome.GOOD:
            member.pauses = 0
            if not member.explicit_pause:
                member.moves(Event.RESUMED)
            if member.life.circuit is Circuit.HALF_OPEN:
                record.probes += 1
                if record.probes >= PROBES:
                    recover(record, now)
                    member.moves(Event.RECOVERED)
            return None
        if member.life.circuit is Circuit.HALF_OPEN:
            return self._eject(member, EjectionReason.PROBE, "it failed again after its ejection", now)
        if member.life.circuit is Circuit.OPEN:
            return None  # what it had when it was ejected
        found = outlying(self._policy, record, (each.record for each in self._members if each is not member), now)
        return self._eject(member, *found, now) if found is not None else None

    def turned_away(self, member: Member, retry_after: float | None, now: float) -> Ejection | None:
        """See `Fleet.turned_away`. Being full is no failure: a pause follows, not an ejection, whatever its rate."""
        if member.life.circuit is Circuit.HALF_OPEN:
            return self._eject(member, EjectionReason.PROBE, "it turned a request away after its ejection", now)
        if member.life.circuit is Circuit.PAUSED and now < member.paused_until:
            # It was on its way when the pause began: no reason for a longer one, unless the worker asks for it.
            member.paused_until = max(member.paused_until, now + min(retry_after or 0.0, self._longest_pause))
            return None
        member.pauses += 1
        pause = max(FIRST_PAUSE * 2.0 ** min(member.pauses - 1, 16), retry_after or 0.0)
        member.explicit_pause = retry_after is not None
        member.paused_until = now + min(pause, self._longest_pause)
        member.moves(Event.PAUSED)
        return None

    def tick(self, now: float) -> None:
        """End what is over."""
        for member in self._members:
            if member.life.circuit is Circuit.PAUSED and now >= member.paused_until:
                member.moves(Event.RESUMED)
            ejection = member.record.ejection
            if member.life.circuit is Circuit.OPEN and ejection is not None and now >= ejection.until:
                member.moves(Event.PROBED)

    def fleet_shrank(self) -> None:
        """There may be too many ejections for the workers that are left: those that end first are probed now."""
        ejected = [member for member in self._fleet() if member.life.circuit is Circuit.OPEN]
        excess = len(ejected) - self._policy.most(len(self._fleet())) if ejected else 0
        if excess > 0:
            for member in sorted(ejected, key=lambda each: each.until() or 0.0)[:excess]:
                member.moves(Event.PROBED)

    def _eject(self, member: Member, reason: EjectionReason, why: str, now: float) -> Ejection | None:
        fleet = self._fleet()
        ejected = sum(each.life.circuit is Circuit.OPEN for each in fleet)
        if member not in fleet or ejected + 1 > self._policy.most(len(fleet)):
            return None
        ejection = eject(self._policy, member.record, reason, why, now)
        member.moves(Event.EJECTED)
        return ejection

    def _fleet(self) -> list[Member]:
        """Those that would get requests if all did well."""
        return [
            member
            for member in self._members
            if member.life.contact is Contact.ALIVE and member.life.intake is Intake.OPEN
        ]
