"""A request on its way through a simulated router: choose, send, retry elsewhere (`router.server.proxy`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum, auto
from functools import partial

from bench.prompts import Prompt
from bench.record import Record
from bench.simulation.cluster import SeededTokens
from bench.simulation.errors import NO_WORKER, ROUTER_LOST, SHED, STREAM_BROKEN, STREAM_LOST, Failure, refusal
from bench.simulation.router import CUT_TIMEOUT, STALL_TIMEOUT, SimulatedRouter
from bench.simulation.worker import ProcessState, SimulatedWorker
from router.core.decision import Decision, NoWorkerReady, RouteRequest
from router.core.flow import ShedReason
from router.core.latency_samples import Usage
from router.core.outliers import Outcome
from router.core.retries import FAULTS, FailureCause, Progress, RequestKind, Retries
from router.core.ticket import Ticket
from worker.emulator.engine.request import EngineRequest, Output

EXCLUDED_PAUSE = 0.1
"""Seconds before a request is sent to the same worker again because there is no other."""
WAIT = 1.0
"""Most seconds between two looks for a worker."""


class RequestState(StrEnum):
    """How far a request has got. (A `StrEnum`, because its members hash in C.)"""

    CHOOSING = auto()
    """A worker is chosen or waited for."""
    PENDING = auto()
    """A worker has it, and the client has received nothing: it may still go to another worker."""
    RESPONDING = auto()
    """The client has received the beginning of the answer."""
    OVER = auto()


class RequestEvent(StrEnum):
    """What happens to a request."""

    SENT = auto()
    ATTEMPT_FAILED = auto()
    ANSWER_BEGUN = auto()
    ENDED = auto()
    """The answer is complete or broken, or nobody answers."""


SIMULATED_REQUEST_TRANSITIONS: Mapping[tuple[RequestState, RequestEvent], RequestState] = {
    (RequestState.CHOOSING, RequestEvent.SENT): RequestState.PENDING,
    (RequestState.CHOOSING, RequestEvent.ENDED): RequestState.OVER,
    (RequestState.PENDING, RequestEvent.ATTEMPT_FAILED): RequestState.CHOOSING,
    (RequestState.PENDING, RequestEvent.ANSWER_BEGUN): RequestState.RESPONDING,
    (RequestState.PENDING, RequestEvent.ENDED): RequestState.OVER,
    (RequestState.RESPONDING, RequestEvent.ENDED): RequestState.OVER,
}


class Attempt:
    """One sending of a request to one worker. What happens to an attempt that is no longer the request's latest one is
    ignored."""

    __slots__ = ("decision", "played", "request", "sent_at", "ticket", "worker")

    def __init__(
        self,
        played: PlayedRequest,
        decision: Decision,
        ticket: Ticket,
        worker: SimulatedWorker,
        request: EngineRequest,
        now: float,
    ) -> None:
        self.sent_at = now
        self.played = played
        self.decision = decision
        self.ticket = ticket
        self.worker = worker
        self.request = request

    def reach(self, now: float) -> None:
        """It arrives at the worker."""
        played, worker, request = self.played, self.worker, self.request
        if played.attempt is not self:
            return
        if worker.state is ProcessState.STOPPED:
            self._later(now, partial(self._failed, FailureCause.REFUSED, Progress.UNSENT, None))
            return
        error = refusal(len(request.prompt), request.max_tokens, worker.kind.engine.max_model_len)
        if error is None:
            worker.submit(now, request, self)
        else:
            self._later(now, partial(self._refused, error))

    def on_output(self, output: Output, at: float) -> None:
        played = self.played
        if played.attempt is not self:
            return
        seen = at + played.router.delays.network
        if output.index == 0:
            played.first_token = seen
            if played.streaming:
                played.router.clock.soon(seen, self._first)
        if output.finish_reason is not None:
            played.router.clock.soon(seen, partial(self._finished, output))

    def on_broken(self, now: float) -> None:
        self._later(now, partial(self._failed, FailureCause.BROKEN, Progress.UNANSWERED, None))

    def _later(self, now: float, happen: Callable[[float], None]) -> None:
        """The router sees it after the network's delay."""
        router = self.played.router
        router.clock.soon(now + router.delays.network, happen)

    def _first(self, now: float) -> None:
        if self.played.attempt is self:
            self.played.advance(RequestEvent.ANSWER_BEGUN)
            self.ticket.first_token(now)

    def _finished(self, output: Output, now: float) -> None:
        played = self.played
        if played.attempt is self:
            self.ticket.finished(now, Usage(len(self.request.prompt), output.index + 1, output.cached_tokens))
            self.ticket.release(now)
            played.answered(output, now)

    def _refused(self, error: Failure, now: float) -> None:
        if self.played.attempt is self:
            self.played.refused(error, now)

    def _failed(self, cause: FailureCause, progress: Progress, answer: Failure | None, now: float) -> None:
        if self.played.attempt is self:
            self.played.failed(cause, progress, answer, now)


class PlayedRequest:
    """One request, from its arrival at a router until the client has an answer or an error.

    `workers`: all there are, by URL. `on_end(record, now)` is called exactly once.
    """

    __slots__ = (
        "_arrived", "_deadline", "_doubted", "_excluded", "_failure", "_key", "_kind", "_look", "_on_end", "_prompt",
        "_retries", "_route", "_workers", "attempt", "first_token", "router", "state", "streaming", "url",
    )  # fmt: skip

    def __init__(
        self,
        prompt: Prompt,
        route: RouteRequest,
        router: SimulatedRouter,
        workers: Mapping[str, SimulatedWorker],
        on_end: Callable[[Record, float], None],
    ) -> None:
        self._prompt = prompt
        self._route = route
        self.router = router
        self._workers = workers
        self._on_end = on_end
        self.streaming = route.streaming
        self.state = RequestState.CHOOSING
        self.attempt: Attempt | None = None
        """The latest one, as long as it goes on."""
        self.url = ""
        self.first_token: float | None = None
        self._key = str(prompt.request.index)
        self._kind = RequestKind("POST", prompt.request.path, None)
        self._arrived = 0.0
        self._retries = Retries(router.policy, router.budget, repeatable=True)
        self._excluded: set[str] = set()
        self._deadline: float | None = None
        self._failure: Failure | None = None
        """The answer of the last attempt that failed, if there was one."""
        self._doubted: set[str] = set()
        self._look = 0
        """Number of the latest look for a worker that is to come."""

    def advance(self, event: RequestEvent) -> None:
        """The only way in which the state changes. Raises `KeyError` for what cannot happen in it."""
        self.state = SIMULATED_REQUEST_TRANSITIONS[self.state, event]

    def arrive(self, now: float) -> None:
        """It arrives at its router."""
        self._arrived = now
        self.router.budget.request(now)
        self.router.requests[self._key] = self
        self.choose(now)

    def choose(self, now: float) -> None:
        """Choose a worker and send (`_ProxiedRequest._choose`); if there is none, look again later."""
        if self.state is not RequestState.CHOOSING:
            return
        router = self.router
        router.waiting.pop(self._key, None)
        self._look += 1
        try:
            decision = router.fleet.choose(self._route, now, self._excluded)
        except NoWorkerReady:
            if self._deadline is None:
                self._deadline = now + router.policy.deadline
            if now >= self._deadline or self._failure is not None:
                self._end(now, self._failure or NO_WORKER)
                return
            pause = min(EXCLUDED_PAUSE if self._excluded else WAIT, self._deadline - now)
            self._excluded.clear()
            router.waiting[self._key] = self
            router.clock.at(now + pause, partial(self._look_again, self._look))
            return
        admission = router.admission
        if admission is not None and not self._retries.sent and admission.must_wait(decision, self._route, now):
            admission.put(self._route, now, self._admitted)
            return
        self._send(decision, now)

    def _admitted(self, shed: ShedReason | None, full: frozenset[str]) -> None:
        """It no longer waits for its turn (`_ProxiedRequest._wait`)."""
        if self.state is not RequestState.CHOOSING:
            return
        now = self.router.clock.now
        if shed is not None:
            self._end(now, SHED)
        else:
            self._send(self.router.fleet.choose(self._route, now, full), now)

    def _send(self, decision: Decision, now: float) -> None:
        router = self.router
        self._retries.sent += 1
        self.advance(RequestEvent.SENT)
        ticket = router.fleet.dispatch(decision, self._route, now)
        self.url = decision.url
        request = self._prompt.request
        sent = self._retries.sent
        self.attempt = attempt = Attempt(
            self,
            decision,
            ticket,
            self._workers[decision.url],
            EngineRequest(
                request_id=self._key if sent == 1 else f"{self._key}/{sent}",
                prompt=self._prompt.tokens,
                max_tokens=request.max_tokens,
                source=SeededTokens(request.index),
                scope=self._prompt.scope,
                ignore_eos=True,
                unread=True,
                keys=self._route.keys,
            ),
            now,
        )
        delays = router.delays
        router.clock.soon(now + delays.network + delays.token * len(self._prompt.tokens), attempt.reach)

    def _look_again(self, look: int, now: float) -> None:
        if look == self._look:
            self.choose(now)

    # --- how an attempt ends ---

    def answered(self, output: Output, now: float) -> None:
        """The whole answer is there."""
        router = self.router
        router.refusals.answered(self.url, self._kind)
        router.note(self.url, Outcome.GOOD, now)
        for other in self._doubted:
            router.note(other, Outcome.REFUSED, now)
        self._end(now, None, output)

    def refused(self, error: Failure, now: float) -> None:
        """The worker refuses the request (`_ProxiedRequest._failing`)."""
        refusals, url, status = self.router.refusals, self.url, 400
        alike = tuple(self._doubted)
        for other in (*alike, url) if alike else ():
            refusals.agreed(other, self._kind, status, now)
        if alike or not refusals.doubtful(url, self._kind, status, now):
            self._release(now)
            self._end(now, error)
            return
        self._doubted.add(url)
        self.failed(FailureCause.DOUBTED, Progress.DECLINED, error, now)

    def failed(self, cause: FailureCause, progress: Progress, answer: Failure | None, now: float) -> None:
        """The attempt failed: another one follows, or the client gets an error."""
        router, url = self.router, self.url
        begun = self.state is RequestState.RESPONDING
        self._release(now)
        if cause in FAULTS:
            router.note(url, Outcome.BAD, now)
        if begun:
            self._end(now, STREAM_BROKEN)
            return
        self.advance(RequestEvent.ATTEMPT_FAILED)
        self.attempt, self.url, self.first_token, self._failure = None, "", None, answer
        self._excluded.add(url)
        self._deadline = now + router.policy.deadline
        if cause is FailureCause.REFUSED:
            router.unreachable(url, now)
        if self._retries.failed(progress, now, broken=cause is FailureCause.BROKEN) is not None:
            self._end(now, answer or NO_WORKER)
        else:
            self.choose(now)

    def lose_worker(self, now: float) -> None:
        """Nobody listens at the address of the worker. What has begun is read to its end."""
        if self.state is RequestState.PENDING:
            self._hang_up(now)
            self.failed(FailureCause.BROKEN, Progress.UNANSWERED, None, now)

    def stalled(self, silent: float, now: float) -> None:
        """The worker has been silent for so many seconds (`InFlight.enforce_timeouts`)."""
        if self.state is RequestState.PENDING and self.attempt is not None:
            over = min(silent, now - self.attempt.sent_at) > STALL_TIMEOUT
        else:
            over = silent > CUT_TIMEOUT
        if over:
            self._hang_up(now)
            self.failed(FailureCause.STALLED, Progress.UNANSWERED, None, now)

    def lose_router(self, now: float) -> None:
        """The router's process ended: the client's connection breaks, and the worker's."""
        if self.attempt is not None:
            self._hang_up(now)
        self._end(now, STREAM_LOST if self.state is RequestState.RESPONDING else ROUTER_LOST)

    def _hang_up(self, now: float) -> None:
        attempt = self.attempt
        if attempt is not None:
            worker, request_id = attempt.worker, attempt.request.request_id
            self.router.clock.at(now + self.router.delays.network, lambda then: worker.hang_up(then, request_id))

    def _release(self, now: float) -> None:
        if self.attempt is not None:
            self.attempt.ticket.release(now, reused=self.attempt.ticket.answered)

    def _end(self, now: float, error: Failure | None, output: Output | None = None) -> None:
        """The client has its answer or its error."""
        attempt, self.attempt = self.attempt, None
        self.advance(RequestEvent.ENDED)
        self.router.waiting.pop(self._key, None)
        del self.router.requests[self._key]
        request = self._prompt.request
        record = Record(
            index=request.index,
            scheduled=request.at,
            sent=self._arrived,
            first_token=self.first_token,
            finished=now if error is None else None,
            worker=attempt.worker.info.worker_id if attempt is not None else "",
            reason=attempt.decision.reason.value if attempt is not None else "",
            matched_blocks=attempt.decision.matched_blocks if attempt is not None else None,
            prompt_tokens=len(self._prompt.tokens),
            cached_tokens=output.cached_tokens if output is not None else None,
            output_tokens=output.index + 1 if output is not None else None,
            error=error.cause if error is not None else None,
            detail=error.detail if error is not None else "",
        )
        self._on_end(record, now)
