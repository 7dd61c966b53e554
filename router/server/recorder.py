"""Decides which requests get a record, and hands each to its readers when the request is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

from router.core.decision import DecisionPhase
from router.metrics import Metrics
from router.server.record import RequestRecord

if TYPE_CHECKING:
    from router.server.tracing import Tracing

MEASURED = 8
"""One in so many requests has its phases measured, which costs it 10 to 100 µs."""

Reader = Callable[[RequestRecord], None]


@dataclass(slots=True)
class Recorder:
    """`readers` get every request's record when it is over; they may come and go. `tracing` traces every request that
    its sampler wants."""

    metrics: Metrics
    clock: Callable[[], float]
    tracing: Tracing | None = None
    readers: list[Reader] = field(default_factory=list)
    measured: int = MEASURED
    _turn: int = 1

    def begin(self, scope: Scope) -> RequestRecord | None:
        """The record of a request that has arrived; None if nothing would read it."""
        self._turn -= 1
        measured = self._turn <= 0
        if measured:
            self._turn = self.measured
        whole = self.tracing is not None or bool(self.readers)
        if not (whole or measured):
            return None
        record = RequestRecord(scope["method"], scope["path"], self.clock, self.clock(), whole, measured)
        if self.tracing is not None:
            record.trace = self.tracing.begin(record, scope)
        return record

    def end(self, record: RequestRecord, status: int, *, left: bool) -> None:
        """The request is over. `left`: its client left before it had the whole answer."""
        record.finish(status, left=left)
        if record.phases is not None:
            for phase, seconds in zip(DecisionPhase, record.phases, strict=True):
                self.metrics.decision_phases[phase].observe(seconds)
        for reader in self.readers:
            reader(record)
        if record.trace is not None:
            record.trace.end(record)
