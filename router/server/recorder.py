"""Decides which requests get a record, and hands each to its readers when the request is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from router.core.decision import DecisionPhase
from router.metrics import Metrics
from router.server.record import RequestRecord

MEASURED = 8
"""One in so many requests has its phases measured while nothing reads all records: measuring costs 10 µs."""

Reader = Callable[[RequestRecord], None]


@dataclass(slots=True)
class Recorder:
    """`readers` get every request's record when it is over; they may come and go."""

    metrics: Metrics
    clock: Callable[[], float]
    readers: list[Reader] = field(default_factory=list)
    _turn: int = 1

    def begin(self, scope: Scope) -> RequestRecord | None:
        """The record of a request that has arrived; None if nothing would read it."""
        whole = bool(self.readers)
        if not whole:
            self._turn -= 1
            if self._turn:
                return None
            self._turn = MEASURED
        return RequestRecord(scope["method"], scope["path"], self.clock, self.clock(), whole)

    def end(self, record: RequestRecord, status: int) -> None:
        """The request is over."""
        record.finish(status)
        if record.phases is not None:
            for phase, seconds in zip(DecisionPhase, record.phases, strict=True):
                self.metrics.decision_phases[phase].observe(seconds)
        for reader in self.readers:
            reader(record)
