"""Whether a request that failed at a worker, or was refused by it, is sent again. Pure.

Three dangers limit retries (`Retries`): the request may have done something (loaded an adapter) that must not be done
twice; it may be what killed its worker, and would kill the next one; and repetitions finish off a fleet that fails
under its load. `RetryBudget` meets the last of them. `Refusals` decides about 4xx answers: whether the client asked for
what nobody serves, or this worker lacks what others have.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Progress(StrEnum):
    """How far a request got before it failed, and so what the worker may have done."""

    UNSENT = "unsent"
    """The worker cannot have acted on it: nothing was sent, or the connection was closed before it arrived."""
    DECLINED = "declined"
    """The worker said that it will not act on it (429, 503, an engine that shuts down)."""
    UNANSWERED = "unanswered"
    """The request was sent, in part at least, and no byte of an answer came: the worker may have acted on it."""
    ANSWERING = "answering"
    """The answer had begun."""

    @property
    def taken_up(self) -> bool:
        """Whether the worker may have acted on the request."""
        return self in (Progress.UNANSWERED, Progress.ANSWERING)


class FailureCause(StrEnum):
    """Why a worker gave no answer that can be passed on. Label `cause` of `kvcluster_router_retries_total`."""

    REFUSED = "refused"
    """The worker refuses connections: no process listens at its address."""
    CONNECT = "connect"
    """The connection could not be made: a timeout, no route, or an unknown host name."""
    BROKEN = "broken"
    """The worker accepted the request and closed the connection, or answered something that is not HTTP."""
    STATUS_5XX = "status_5xx"
    BUSY = "busy"
    """The worker answered 503 or 429: its queue is full, or it is draining."""
    DOUBTED = "doubted"
    """The worker refused the request (4xx), but another worker may accept it (`Refusals`)."""
    ERROR_EVENT = "error_event"
    """The first event of the stream is an error: the engine died."""
    ABORTED = "aborted"
    """The finish reason is "abort" and no text came before it: the engine is shutting down."""
    LEFT = "left"
    """The worker was removed from the list of workers before it answered."""
    STALLED = "stalled"
    """The worker gave no sign of life for longer than the stall timeout: a frozen process, or a lost node."""
    TIMEOUT = "timeout"
    """The worker is alive but sent nothing for longer than the answer or idle timeout."""


FAULTS = frozenset(
    {
        FailureCause.BROKEN,
        FailureCause.CONNECT,
        FailureCause.STATUS_5XX,
        FailureCause.ERROR_EVENT,
        FailureCause.TIMEOUT,
        FailureCause.STALLED,
    }
)
"""The failures that count against a worker. A full, leaving or absent worker is noticed by other means."""


class Denial(StrEnum):
    """Why a request is not sent again. Label `why` of `kvcluster_router_retries_denied_total`."""

    ATTEMPTS = "attempts"
    """It was sent as often as any request may be."""
    UNSAFE = "unsafe"
    """Doing it twice may have another effect than doing it once."""
    SUSPECT = "suspect"
    """As many workers as `RetryPolicy.casualties` failed on it: it may be the cause, and is kept from the others."""
    BUDGET = "budget"
    """Retries are already too large a share of the traffic."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is sent before its client gets an error."""

    attempts: int = 4
    """Most times that it is sent."""
    deadline: float = 10.0
    """Seconds after a failure (or after no worker was ready) during which another worker is looked for."""
    casualties: int = 2
    """Workers that may take it up and fail before it is no longer sent to others."""


class Retries:
    """The attempts at one request so far."""

    __slots__ = ("_budget", "_casualties", "_policy", "_repeatable", "sent")

    def __init__(self, policy: RetryPolicy, budget: RetryBudget, *, repeatable: bool) -> None:
        self._policy = policy
        self._budget = budget
        self._repeatable = repeatable
        self._casualties = 0
        self.sent = 0
        """How often it was sent."""

    def failed(self, progress: Progress, now: float, *, broken: bool = False) -> Denial | None:
        """It failed after this progress. Returns None if it may be sent again, and then counts that against the budget.

        `broken`: its connection died. It is not always known what the worker had read by then, so the worker counts as
        one that the request may have killed, whatever the progress.
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


WINDOW = 10
"""Seconds over which requests and retries are counted, in slots of a second."""


@dataclass(slots=True)
class _Slot:
    second: int
    requests: int = 0
    retries: int = 0


class RetryBudget:
    """How many requests may be sent again, as a share of those that came.

    In any `WINDOW` seconds: retries <= `share` x requests + `floor` x WINDOW. After Finagle's `RetryBudget`: without a
    budget, retries multiply the load exactly when workers fail because of it; the floor is for times with little
    traffic. O(1), at most WINDOW slots.
    """

    def __init__(self, *, share: float, floor: float) -> None:
        self._share = share
        self._floor = floor
        self._slots: deque[_Slot] = deque()
        self._requests = self._retries = 0

    def request(self, now: float) -> None:
        """A request has come; `now` in seconds."""
        self._slot(now).requests += 1
        self._requests += 1

    def retry(self, now: float) -> bool:
        """Whether a request may be sent again; if so, this is counted."""
        slot = self._slot(now)
        if self._retries + 1 > self._share * self._requests + self._floor * WINDOW:
            return False
        slot.retries += 1
        self._retries += 1
        return True

    def left(self, now: float) -> float:
        """How many more requests may be sent again now."""
        self._slot(now)
        return max(self._share * self._requests + self._floor * WINDOW - self._retries, 0.0)

    def _slot(self, now: float) -> _Slot:
        second = int(now)
        while self._slots and self._slots[0].second <= second - WINDOW:
            old = self._slots.popleft()
            self._requests -= old.requests
            self._retries -= old.retries
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(_Slot(second))
        return self._slots[-1]


DOUBT_AFTER = 3
"""Consecutive refusals of one worker after which every further one is doubted."""
REMEMBERED = 60.0
"""Seconds for which it is remembered that two workers refuse a kind of request alike."""
MAX_KINDS = 1024

ABOUT_THE_KIND = frozenset({401, 403, 404, 405, 410, 415})
"""Statuses that are about the address, the method, the model or the caller: every request of the kind gets them.
Others (400, 413, 422) are about the body of one request."""


class RequestKind(NamedTuple):
    """What a refusal may be about, and many requests have in common."""

    method: str
    path: str
    model: str | None


class Refusals:
    """What is known about refusals. O(1) a request; the state is at most `MAX_KINDS` kinds and a number for each
    worker.

    The fault of the client and the fault of the worker look alike in one answer; another worker's answer to the same
    request tells them apart. So a refusal is doubted, which means that the request is sent to another worker too, while
    nothing is known about it, and it counts against its worker only if the other one answered. What two workers refuse
    alike is the client's fault, and is not doubted again for a while.
    """

    def __init__(self) -> None:
        self._streaks: dict[str, int] = {}
        self._agreed: OrderedDict[RequestKind, float] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any refusal is remembered."""
        return bool(self._streaks or self._agreed)

    def doubtful(self, url: str, kind: RequestKind, status: int, now: float) -> bool:
        """The worker refused with `status`. Returns whether another worker should be asked."""
        streak = self._streaks[url] = self._streaks.get(url, 0) + 1
        if status not in ABOUT_THE_KIND:
            return streak > DOUBT_AFTER
        agreed_at = self._agreed.get(kind)
        return agreed_at is None or now - agreed_at > REMEMBERED

    def answered(self, url: str, kind: RequestKind) -> None:
        """The worker answered: it does not refuse everything, and this kind of request is served."""
        self._streaks.pop(url, None)
        self._agreed.pop(kind, None)

    def agreed(self, url: str, kind: RequestKind, status: int, now: float) -> None:
        """Another worker refused with the same status what this one had refused: the client is at fault."""
        self._streaks.pop(url, None)
        if status not in ABOUT_THE_KIND:
            return
        self._agreed[kind] = now
        self._agreed.move_to_end(kind)
        while len(self._agreed) > MAX_KINDS:
            self._agreed.popitem(last=False)

    def forget(self, url: str) -> None:
        """The worker is gone."""
        self._streaks.pop(url, None)
