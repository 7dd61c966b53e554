"""Whether a request that failed at a worker may be sent again. Pure.

Three dangers decide: the request may have done something (loaded an adapter) that must not be done twice; it may be
what killed its worker, and would kill the next; and a fleet that fails under its load is finished off by repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.core.budget import RetryBudget


class Progress(StrEnum):
    """How far an exchange got before it failed: what may have happened at the worker."""

    UNSENT = "unsent"
    """The worker cannot have acted on it: nothing was sent, or the connection was closed before it arrived."""
    DECLINED = "declined"
    """The worker said that it does not act on it (429, 503, an engine that shuts down)."""
    UNANSWERED = "unanswered"
    """The request was sent, in part at least, and no byte of an answer came: the worker may have acted on it."""
    ANSWERING = "answering"
    """The answer had begun."""

    @property
    def taken_up(self) -> bool:
        """Whether the worker may have acted on the request."""
        return self in (Progress.UNANSWERED, Progress.ANSWERING)


class Denial(StrEnum):
    """Why a request is not sent again. Label `why` of `kvcluster_router_retries_denied_total`."""

    ATTEMPTS = "attempts"
    """It was sent as often as any may be."""
    UNSAFE = "unsafe"
    """Doing it twice may not be the same as doing it once."""
    SUSPECT = "suspect"
    """Two workers took it up and failed: it may be the cause, and is kept from the others."""
    BUDGET = "budget"
    """Too large a share of the traffic is repetitions already."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a request is sent around before its client gets an error."""

    attempts: int = 4
    """How often it is sent at most."""
    deadline: float = 10.0
    """Seconds since a failure (or since no worker was ready) in which another worker is looked for."""
    casualties: int = 2
    """Workers that may take it up and fail."""


class Retries:
    """What has become of one request so far."""

    __slots__ = ("_budget", "_casualties", "_policy", "_repeatable", "sent")

    def __init__(self, policy: RetryPolicy, budget: RetryBudget, *, repeatable: bool) -> None:
        self._policy = policy
        self._budget = budget
        self._repeatable = repeatable
        self._casualties = 0
        self.sent = 0
        """How often it was sent."""

    def failed(self, progress: Progress, now: float, *, broken: bool = False) -> Denial | None:
        """It failed, having got so far: None when it may be sent again, which is then counted.

        `broken`: its connection died. What the worker had read by then is not always known, so it counts among those
        that the request may have killed, whatever the progress.
        """
        if progress.taken_up or broken:
            self._casualties += 1
        if progress is not Progress.UNSENT and not self._repeatable:
            return Denial.UNSAFE
        if self._casualties >= self._policy.casualties:
            return Denial.SUSPECT
        if self.sent >= self._policy.attempts:
            return Denial.ATTEMPTS
        if progress is not Progress.UNSENT and not self._budget.retry(now):
            return Denial.BUDGET
        return None
