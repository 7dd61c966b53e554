"""Requests in flight: how far each has got, which worker has it, and the timeouts on waiting for that worker."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from router.core.retries import FailureCause
from router.upstream.interface import UpstreamError
from runtime.inline import Cancellable

NOT_WAITING = float("inf")


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Seconds for which a worker may send nothing.

    A worker that gives signs of life (its cache feed, its /health) may compute for long. A worker that gives none is
    most likely frozen for a moment only, and what it has computed is lost when its requests move to others.
    """

    answer: float
    """Before the answer begins, while the worker is alive."""
    idle: float
    """Within an answer, while the worker is alive."""
    stall: float
    """Without any sign of life, before requests whose answer has not begun are sent to another worker."""
    cut: float
    """Without any sign of life, before answers that have begun are cut off."""


class RequestState(StrEnum):
    """How far a request has got on its way through the router.

    The client may leave in any state: then the task that handles the request is cancelled.
    """

    CHOOSING = "choosing"
    """No worker has the request: one is chosen or waited for."""
    PENDING = "pending"
    """A worker has the request, and the client has received nothing: the request may still go to another worker."""
    RESPONDING = "responding"
    """The client has received the head of the answer: the whole request can no longer go to another worker."""
    RESUMING = "resuming"
    """The worker failed in the middle of a stream: another is chosen or waited for that goes on with it."""
    CONTINUING = "continuing"
    """A worker has the rest of the request, and the client has received nothing of what it answers."""
    COMPLETE = "complete"
    """The client has received one worker's whole answer."""
    BROKEN = "broken"
    """The client has received less than a whole answer."""
    UNANSWERED = "unanswered"
    """No worker gave an answer: the client receives the last refusal or an error of the router's own."""


class RequestEvent(StrEnum):
    """What happens to a request."""

    SENT = "sent to a worker"
    ATTEMPT_FAILED = "attempt failed"
    ANSWER_BEGUN = "answer begun"
    ANSWER_COMPLETE = "answer complete"
    ANSWER_BROKEN = "answer broken"
    GIVEN_UP = "given up"


REQUEST_TRANSITIONS: Mapping[RequestState, Mapping[RequestEvent, RequestState]] = {
    RequestState.CHOOSING: {
        RequestEvent.SENT: RequestState.PENDING,
        RequestEvent.GIVEN_UP: RequestState.UNANSWERED,
    },
    RequestState.PENDING: {
        RequestEvent.ATTEMPT_FAILED: RequestState.CHOOSING,
        RequestEvent.ANSWER_BEGUN: RequestState.RESPONDING,
    },
    RequestState.RESPONDING: {
        RequestEvent.ANSWER_COMPLETE: RequestState.COMPLETE,
        RequestEvent.ANSWER_BROKEN: RequestState.BROKEN,
        RequestEvent.ATTEMPT_FAILED: RequestState.RESUMING,
    },
    RequestState.RESUMING: {
        RequestEvent.SENT: RequestState.CONTINUING,
        RequestEvent.GIVEN_UP: RequestState.BROKEN,
    },
    RequestState.CONTINUING: {
        RequestEvent.ATTEMPT_FAILED: RequestState.RESUMING,
        RequestEvent.ANSWER_BEGUN: RequestState.RESPONDING,
    },
    RequestState.COMPLETE: {},
    RequestState.BROKEN: {},
    RequestState.UNANSWERED: {},
}
"""What is not listed cannot happen, and is an error."""
AWAITING = frozenset({RequestState.PENDING, RequestState.CONTINUING})
"""A worker has the request and has not begun to answer it: it may still go to another one."""


class InFlightRequest:
    """One request, at one worker at a time. `task` handles it."""

    __slots__ = ("_state", "aborted", "task", "waiting_since")

    def __init__(self, task: Cancellable) -> None:
        self.task = task
        self._state = RequestState.CHOOSING
        self.aborted: UpstreamError | None = None
        """Why the router stopped waiting for the worker; None: it has not."""
        self.waiting_since = NOT_WAITING
        """Since when the worker has sent nothing. `NOT_WAITING` while the router waits for the client."""

    @property
    def state(self) -> RequestState:
        return self._state

    def advance(self, event: RequestEvent) -> None:
        """Every change of state. Raises `RuntimeError` if `event` cannot happen in this state."""
        state = REQUEST_TRANSITIONS[self._state].get(event)
        if state is None:
            raise RuntimeError(f"{event.value!r} cannot happen to a request that is {self._state.value}")
        self._state = state

    def begin_attempt(self, now: float) -> None:
        """A worker gets the request now."""
        self.advance(RequestEvent.SENT)
        self.waiting_since = now
        self.aborted = None

    def abort(self, cause: FailureCause, why: str) -> None:
        """Stop waiting for the worker: `InFlight.at` raises `UpstreamError(cause)` in the request's task."""
        if self.aborted is None:
            self.aborted = UpstreamError(cause, why)
            self.task.cancel(why)


class _Attempt:
    """`InFlight.at`. (`contextlib.contextmanager` takes ten times as long.)"""

    __slots__ = ("_in_flight", "_request", "_url")

    def __init__(self, in_flight: InFlight, url: str, request: InFlightRequest) -> None:
        self._in_flight, self._url, self._request = in_flight, url, request

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        request = self._request
        self._in_flight.over(self._url, request)
        if kind is asyncio.CancelledError and request.aborted is not None and request.task.uncancel() <= 0:
            raise request.aborted from None  # otherwise the client left, or the router is shutting down


class InFlight:
    """The requests that are with a worker, by worker URL. There is no timer for each request: `enforce_timeouts` looks
    at all of them a few times a second."""

    def __init__(self, timeouts: UpstreamTimeouts) -> None:
        self._timeouts = timeouts
        self._requests: defaultdict[str, set[InFlightRequest]] = defaultdict(set)

    def at(self, url: str, request: InFlightRequest, now: float) -> _Attempt:
        """A context in which the worker at `url` has `request`, which the calling task handles. It raises
        `UpstreamError` if the request is aborted meanwhile."""
        request.begin_attempt(now)
        self._requests[url].add(request)
        return _Attempt(self, url, request)

    def over(self, url: str, request: InFlightRequest) -> None:
        """The worker has the request no more."""
        requests = self._requests[url]
        requests.discard(request)
        if not requests:
            del self._requests[url]

    def abort_pending(self, url: str, cause: FailureCause, why: str) -> None:
        """The worker will not answer: send the requests whose answer it has not begun to another worker."""
        for request in list(self._requests.get(url, ())):
            if request.state in AWAITING:
                request.abort(cause, why)

    def enforce_timeouts(self, now: float, silence: Callable[[str, float], float]) -> None:
        """Abort the requests whose worker has sent nothing for too long.

        `silence(url, now)` gives the seconds for which a worker has given no sign of life; 0 while it is alive.
        """
        timeouts = self._timeouts
        for url, requests in self._requests.items():
            silent = silence(url, now)
            for request in list(requests):
                responding = request.state not in AWAITING
                stalled = timeouts.cut if responding else timeouts.stall
                limit = timeouts.idle if responding else timeouts.answer
                waited = now - request.waiting_since
                # Pieces of an answer are signs of life too, of a worker that is too busy for its /health.
                if min(silent, waited) > stalled:
                    request.abort(FailureCause.STALLED, f"the worker gave no sign of life for {stalled:g} s")
                elif waited > limit:
                    request.abort(FailureCause.TIMEOUT, f"the worker sent nothing for {limit:g} s")

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._requests.values())
