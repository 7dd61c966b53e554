"""How well the workers of a fleet answer: who is paused, ejected, probed. The workers' circuits are moved from here."""

from __future__ import annotations

from collections.abc import Collection

from router.core.config import FleetConfig
from router.core.outliers import PROBES, Ejection, EjectionReason, Outcome, eject, outlying, recover
from router.core.worker import Worker
from router.core.worker_state import Circuit, Contact, Event, Intake
from runtime.backoff import Backoff

FIRST_PAUSE = 1.0
"""Seconds for which a worker that turns requests away, and says not for how long, is left alone; doubled each time."""

_BY_INTAKE = {Intake.OPEN: Event.OPENED, Intake.DRAINING: Event.DRAINS, Intake.CLOSED: Event.CLOSES}


class Health:
    """Invariant, after every call: at most `policy.share` of the workers that live and take requests is ejected."""

    def __init__(self, config: FleetConfig, workers: Collection[Worker]) -> None:
        self._longest_pause = config.longest_pause
        self._pauses = Backoff(FIRST_PAUSE, config.longest_pause)
        self._policy = config.outliers
        self._workers = workers

    def set_intake(self, worker: Worker, intake: Intake) -> None:
        """What the worker does with new requests."""
        worker.moves(_BY_INTAKE[intake])
        self.fleet_shrank()

    def answered(self, worker: Worker, outcome: Outcome, now: float) -> Ejection | None:
        """See `Fleet.answered`."""
        record = worker.record
        record.count(outcome, now)
        if outcome is Outcome.GOOD:
            worker.pauses = 0
            if not worker.explicit_pause:
                worker.moves(Event.RESUMED)
            if worker.life.circuit is Circuit.HALF_OPEN:
                record.probes += 1
                if record.probes >= PROBES:
                    recover(record, now)
                    worker.moves(Event.RECOVERED)
            return None
        if worker.life.circuit is Circuit.HALF_OPEN:
            return self._eject(worker, EjectionReason.PROBE, "it failed again after its ejection", now)
        if worker.life.circuit is Circuit.OPEN:
            return None  # what it had when it was ejected
        found = outlying(self._policy, record, (each.record for each in self._workers if each is not worker), now)
        return self._eject(worker, *found, now) if found is not None else None

    def turned_away(self, worker: Worker, retry_after: float | None, now: float) -> Ejection | None:
        """See `Fleet.turned_away`. Being full is no failure: a pause follows, not an ejection, whatever its rate."""
        if worker.life.circuit is Circuit.HALF_OPEN:
            return self._eject(worker, EjectionReason.PROBE, "it turned a request away after its ejection", now)
        if worker.life.circuit is Circuit.PAUSED and now < worker.paused_until:
            # It was on its way when the pause began: no reason for a longer one, unless the worker asks for it.
            worker.paused_until = max(worker.paused_until, now + min(retry_after or 0.0, self._longest_pause))
            return None
        worker.pauses += 1
        pause = max(self._pauses.delay(worker.pauses), retry_after or 0.0)
        worker.explicit_pause = retry_after is not None
        worker.paused_until = now + min(pause, self._longest_pause)
        worker.moves(Event.PAUSED)
        return None

    def tick(self, now: float) -> None:
        """End what is over."""
        for worker in self._workers:
            if worker.life.circuit is Circuit.PAUSED and now >= worker.paused_until:
                worker.moves(Event.RESUMED)
            ejection = worker.record.ejection
            if worker.life.circuit is Circuit.OPEN and ejection is not None and now >= ejection.until:
                worker.moves(Event.PROBED)

    def fleet_shrank(self) -> None:
        """There may be too many ejections for the workers that are left: those that end first are probed now."""
        ejected = [worker for worker in self._fleet() if worker.life.circuit is Circuit.OPEN]
        excess = len(ejected) - self._policy.most(len(self._fleet())) if ejected else 0
        if excess > 0:
            for worker in sorted(ejected, key=lambda each: each.until() or 0.0)[:excess]:
                worker.moves(Event.PROBED)

    def _eject(self, worker: Worker, reason: EjectionReason, why: str, now: float) -> Ejection | None:
        fleet = self._fleet()
        ejected = sum(each.life.circuit is Circuit.OPEN for each in fleet)
        if worker not in fleet or ejected + 1 > self._policy.most(len(fleet)):
            return None
        ejection = eject(self._policy, worker.record, reason, why, now)
        worker.moves(Event.EJECTED)
        return ejection

    def _fleet(self) -> list[Worker]:
        """Those that would get requests if all did well."""
        return [
            worker
            for worker in self._workers
            if worker.life.contact is Contact.ALIVE and worker.life.intake is Intake.OPEN
        ]
