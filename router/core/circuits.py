"""The circuit breakers of a fleet: which workers are paused, ejected and probed after what they answered."""

from __future__ import annotations

from collections.abc import Collection

from router.core.config import FleetConfig
from router.core.outliers import PROBES, Ejection, EjectionReason, Outcome, eject, outlying, recover
from router.core.worker import Worker
from router.core.worker_state import Circuit, Intake, WorkerEvent
from runtime.backoff import Backoff

FIRST_PAUSE = 1.0
"""Seconds of the first pause of a worker that turns requests away without saying for how long; each further pause lasts
twice as long."""


class Circuits:
    """Moves the circuit of every worker.

    Invariant, after every call: at most `policy.share` of the workers that are reachable and take requests are
    ejected.
    """

    def __init__(self, config: FleetConfig, workers: Collection[Worker]) -> None:
        self._longest_pause = config.longest_pause
        self._pauses = Backoff(FIRST_PAUSE, config.longest_pause)
        self._policy = config.outliers
        self._workers = workers

    def answered(self, worker: Worker, outcome: Outcome, now: float) -> Ejection | None:
        """See `Fleet.answered`."""
        record = worker.record
        record.count(outcome, now)
        if outcome is Outcome.GOOD:
            worker.pauses = 0
            circuit = worker.state.circuit
            if circuit is Circuit.BACKING_OFF:
                worker.advance(WorkerEvent.ANSWERED)
            elif circuit is Circuit.HALF_OPEN:
                record.probes += 1
                if record.probes >= PROBES:
                    recover(record, now)
                    worker.advance(WorkerEvent.RECOVERED)
            return None
        if worker.state.circuit is Circuit.HALF_OPEN:
            return self._eject(worker, EjectionReason.PROBE, "it failed again after its ejection", now)
        if worker.state.circuit is Circuit.OPEN:
            return None  # the request was sent before the ejection
        found = outlying(self._policy, record, (each.record for each in self._workers if each is not worker), now)
        return self._eject(worker, *found, now) if found is not None else None

    def turned_away(self, worker: Worker, retry_after: float | None, now: float) -> Ejection | None:
        """See `Fleet.turned_away`. Being full is not a failure: it leads to a pause, never to an ejection."""
        if worker.state.circuit is Circuit.HALF_OPEN:
            return self._eject(worker, EjectionReason.PROBE, "it turned a request away after its ejection", now)
        if worker.paused and now < worker.paused_until:
            # The request was sent before the pause began: no reason for a longer one, unless the worker asks for it.
            worker.paused_until = max(worker.paused_until, now + min(retry_after or 0.0, self._longest_pause))
            return None
        worker.pauses += 1
        pause = max(self._pauses.delay(worker.pauses), retry_after or 0.0)
        worker.paused_until = now + min(pause, self._longest_pause)
        worker.advance(WorkerEvent.TURNED_AWAY if retry_after is None else WorkerEvent.TURNED_AWAY_UNTIL)
        return None

    def tick(self, now: float) -> None:
        """End the pauses and ejections whose time is over."""
        for worker in self._workers:
            if worker.paused and now >= worker.paused_until:
                worker.advance(WorkerEvent.PAUSE_ENDED)
            ejection = worker.record.ejection
            if worker.state.circuit is Circuit.OPEN and ejection is not None and now >= ejection.until:
                worker.advance(WorkerEvent.EJECTION_ENDED)

    def fleet_shrank(self) -> None:
        """If there are too many ejections for the workers that are left, end those early that would end first."""
        ejected = [worker for worker in self._fleet() if worker.state.circuit is Circuit.OPEN]
        excess = len(ejected) - self._policy.most(len(self._fleet())) if ejected else 0
        if excess > 0:
            for worker in sorted(ejected, key=lambda each: each.state_ends_at() or 0.0)[:excess]:
                worker.advance(WorkerEvent.EJECTION_ENDED)

    def _eject(self, worker: Worker, reason: EjectionReason, why: str, now: float) -> Ejection | None:
        fleet = self._fleet()
        ejected = sum(each.state.circuit is Circuit.OPEN for each in fleet)
        if worker not in fleet or ejected + 1 > self._policy.most(len(fleet)):
            return None
        ejection = eject(self._policy, worker.record, reason, why, now)
        worker.advance(WorkerEvent.EJECTED)
        return ejection

    def _fleet(self) -> list[Worker]:
        """The workers that would get requests if none were ejected."""
        return [worker for worker in self._workers if worker.reachable and worker.state.intake is Intake.OPEN]
