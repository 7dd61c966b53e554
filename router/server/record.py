"""What happened to one request: written along its way, read by the access log, traces and the metrics of phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.core.decision import Decision, RouteRequest
from router.core.latency_samples import Usage
from router.core.retries import FailureCause
from router.server.measured import MeasuredKeys

if TYPE_CHECKING:
    from router.server.tracing import RequestTrace


LONGEST = 256
"""Characters of what a client or a worker states (a path, a model, an id) that go into a line or a span."""


def stated(text: str) -> str:
    """What somebody else states in a form that can be written down: not too long, and encodable."""
    return text[:LONGEST].encode(errors="replace").decode()


@dataclass(slots=True)
class Attempt:
    """The request at one worker. Times of the router's clock."""

    decision: Decision
    choosing_at: float
    """When the search for a worker began that found this one."""
    sent_at: float
    ended_at: float | None = None
    """None while it is under way."""
    cause: FailureCause | None = None
    """Why it failed; None: it did not."""


@dataclass(slots=True)
class RequestRecord:
    """One request. Times of the router's clock; None or empty where it did not get so far, or the answer does not say.

    Only a few requests have one unless something reads them all: what writes to it asks first whether it exists.
    """

    method: str
    path: str
    clock: Callable[[], float]
    arrived: float
    whole: bool
    """It is kept for a reader of all fields; otherwise for the phases of its decision alone."""
    measured: bool = False
    """The phases of its decision are measured."""
    request_id: bytes = b""
    route: RouteRequest | None = None
    choosing_at: float = 0.0
    waited: float | None = None
    """Seconds that it waited for room on a worker; None: it did not have to."""
    attempts: list[Attempt] = field(default_factory=list)
    phases: tuple[float, ...] | None = None
    """Seconds of each `DecisionPhase`, in order; None if the prompt was not read, or no worker was ready at once."""
    first_token_at: float | None = None
    usage: Usage | None = None
    cause: FailureCause | None = None
    """Why the answer broke off."""
    status: int = 0
    """As the metrics count it."""
    left: bool = False
    """The client left before it had its whole answer."""
    answer_status: int = 0
    """As it was sent to the client."""
    sent_bytes: int = 0
    """Of the answer's body."""
    ended: float = 0.0
    trace: RequestTrace | None = None
    _keys: MeasuredKeys | None = None
    _searches: int = 0
    _looked_up_at: float = 0.0
    _hashed: tuple[float, float] = (0.0, 0.0)
    """Seconds of hashing before the search for a worker, and before its lookup ended."""

    def read(self, route: RouteRequest, request_id: bytes) -> None:
        """The request was read."""
        self.route, self.request_id = route, request_id
        self._keys = route.keys if isinstance(route.keys, MeasuredKeys) else None

    def choosing(self, now: float) -> None:
        """The search for a worker begins."""
        self.choosing_at = now
        self._searches += 1
        if self._keys is not None:
            self._hashed = (self._keys.hash_seconds, 0.0)

    def looked_up(self) -> None:
        """It is known which worker holds how much of the prompt."""
        self._looked_up_at = self.clock()
        if self._keys is not None:
            self._hashed = (self._hashed[0], self._keys.hash_seconds)

    def sent(self, decision: Decision, now: float) -> None:
        """The request goes to a worker."""
        if self._searches == 1 and self._keys is not None:
            self.phases = self._measured(self._keys, now)
        if self.trace is not None:
            self.trace.attempt(decision, len(self.attempts), now)
        self.attempts.append(Attempt(decision, self.choosing_at, now))

    def _measured(self, keys: MeasuredKeys, now: float) -> tuple[float, ...]:
        read, looked_up = self._hashed
        return (
            self.choosing_at - self.arrived - keys.tokenize_seconds - read,
            keys.tokenize_seconds,
            keys.hash_seconds,
            self._looked_up_at - self.choosing_at - (looked_up - read),
            now - self._looked_up_at - (keys.hash_seconds - looked_up),
        )

    def attempt_ended(self, cause: FailureCause | None) -> None:
        """The attempt under way failed, or answered the client (None). Idempotent."""
        if self.attempts and self.attempts[-1].ended_at is None:
            self.attempts[-1].ended_at = now = self.clock()
            self.attempts[-1].cause = cause
            if self.trace is not None:
                self.trace.attempt_ended(cause, now)

    def finish(self, status: int, *, left: bool = False) -> None:
        """The request is over."""
        self.status, self.left = status, left
        self.attempt_ended(self.cause)
        self.ended = self.clock()
