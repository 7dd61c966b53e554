"""One request's way through the router: choose a worker, send, retry at another, pass the answer on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import ceil

from kvcache.errors import ApiError, MessagesError
from router.core.decision import Decision, NoWorkerReady, RecentDecisions, RouteRequest
from router.core.fleet import Fleet
from router.core.outliers import Ejection, Outcome
from router.core.retries import FAULTS, FailureCause, Progress, Refusals, RequestKind, Retries, RetryBudget, RetryPolicy
from router.core.stored_responses import HolderGone, response_id
from router.metrics import Metrics
from router.server.admission import Admission, Shed
from router.server.affinity import with_request_id
from router.server.headers import find, retry_after
from router.server.own_answers import answer_error, answer_shed, response_not_found
from router.server.prompts import MESSAGES
from router.server.relay import STREAM_BROKEN, AttemptFailure, Client, Relay
from router.server.resumption import Resumption
from router.upstream.in_flight import InFlight, InFlightRequest, RequestEvent, RequestState
from router.upstream.interface import Upstream, UpstreamError, UpstreamRequest, UpstreamResponse
from runtime.inline import Cancellable, within_task
from runtime.logs import EventLogger

logger = EventLogger(__name__)

EXCLUDED_PAUSE = 0.1
"""Seconds before a request is sent to the same worker again because there is no other."""
SETTLED_AFTER = 10.0
"""Seconds after its start by which a router knows every worker, those that register themselves included."""
DRAIN_KNOWN_AFTER = 1.25
"""Seconds after a worker answered 503 by which its /health has been asked, so that it is known whether it drains."""

_OF_ONE_RANK = frozenset({FailureCause.STATUS_5XX, FailureCause.ERROR_EVENT, FailureCause.TIMEOUT})
"""The failures that another data-parallel rank of the same process may not share: its engine failed. The others are the
process's: it refuses connections, turns requests away, is silent, or rejects what it takes for a bad request."""


@dataclass(slots=True)
class Proxy:
    """What every request needs. `on_refused(url, why)` is called when a worker refuses a connection, `on_busy(url)`
    when it answers 429 or 503."""

    fleet: Fleet
    upstream: Upstream
    in_flight: InFlight
    metrics: Metrics
    recent: RecentDecisions
    clock: Callable[[], float]
    changed: asyncio.Event
    """Set when a worker may have become ready. Whoever waits for that clears it first."""
    policy: RetryPolicy
    budget: RetryBudget
    refusals: Refusals
    on_refused: Callable[[str, str], None]
    on_busy: Callable[[str], None]
    resumptions: Callable[[UpstreamRequest, RouteRequest], Resumption | None] | None = None
    """How a stream goes on elsewhere if its worker fails; None: streams do not."""
    admission: Admission | None = None
    """Where requests wait while all workers are busy; None: in the workers."""
    started: float = field(init=False)
    """When the router started."""

    def __post_init__(self) -> None:
        self.started = self.clock()

    async def forward(
        self,
        request: UpstreamRequest,
        client: Client,
        task: Cancellable,
    ) -> int:
        """Answer one request, which `task` does. Returns the status. Raises `OSError` when the client left."""
        route = client.route
        self.budget.request(client.arrived)
        retries = Retries(self.policy, self.budget, repeatable=request.repeatable)
        resumption = self.resumptions(request, route) if self.resumptions is not None else None
        proxied = _ProxiedRequest(self, request, client, InFlightRequest(task), retries, resumption)
        try:
            return await proxied.run()
        except Shed as shed:
            return answer_shed(client.answer, shed, client.request_id, messages=request.target.startswith(MESSAGES))

    def sharing(self, url: str, cause: FailureCause) -> list[str]:
        """The workers that a failure of the one at `url` is about: every rank of its process, or that one alone."""
        return [url] if cause in _OF_ONE_RANK else self.fleet.directory.ranks(url) or [url]

    def note(self, url: str, outcome: Outcome) -> None:
        """Tell the fleet how a worker dealt with a request, and log and count the ejection that may follow."""
        self.note_ejection(url, self.fleet.answered(url, outcome, self.clock()))

    def note_ejection(self, url: str, ejection: Ejection | None) -> None:
        """Log and count an ejection, if there is one."""
        if ejection is None:
            return
        self.metrics.ejections.labels(ejection.reason.value).inc()
        logger.warning(
            "worker_ejected",
            worker=url,
            reason=ejection.reason.value,
            why=ejection.why,
            seconds=ejection.seconds,
        )


@dataclass(slots=True)
class _ProxiedRequest:
    """One request and its answer. `in_flight` holds its state."""

    proxy: Proxy
    request: UpstreamRequest
    client: Client
    in_flight: InFlightRequest
    retries: Retries
    resumption: Resumption | None
    excluded: Set[str] = frozenset()
    """URLs of the workers that failed, which are not chosen again while there are others."""
    deadline: float | None = None
    """When to stop waiting for another worker; None before the first failure and the first wait."""
    retry_after: float = 1.0
    unready: str = ""
    """Why there was no worker, when one was last looked for in vain."""
    holder_gone: bool = False
    """No known worker stores the response that the request is about."""
    failure: AttemptFailure | None = None
    """The last attempt's failure."""
    told_to_wait_at: float | None = None
    """When the last worker that was tried answered with a Retry-After; None if it did not."""
    doubted: dict[str, int] = field(default_factory=dict)
    """Statuses of the refusals that were doubted, by worker URL."""
    status: int = 0

    @property
    def kind(self) -> RequestKind:
        """What refusals of it may be about."""
        return RequestKind(self.request.method, self.request.target.partition("?")[0], self.client.route.model)

    async def run(self) -> int:
        proxy, retries, record = self.proxy, self.retries, self.client.record
        while (decision := await self._choose()) is not None:
            if self.failure is not None:
                proxy.metrics.retries.labels(self.failure.cause.value).inc()
            retries.sent += 1
            if self.client.route.prompted:
                self._count(decision)
            self.failure = await self._attempt(decision)
            if record is not None:
                record.attempt_ended(self.failure.cause if self.failure is not None else record.cause)
            if self.failure is None:
                if logger.is_enabled_for(logging.DEBUG):
                    self._log_answer(decision)
                return self.status
            self.in_flight.advance(RequestEvent.ATTEMPT_FAILED)
            self._note_failure(decision, self.failure)
            broken = self.failure.cause is FailureCause.BROKEN
            denial = retries.failed(self.failure.progress, proxy.clock(), broken=broken)
            if denial is not None:
                proxy.metrics.retries_denied.labels(denial.value).inc()
                break
        self._answer_without_worker()
        return self.status

    def _count(self, decision: Decision) -> None:
        proxy = self.proxy
        proxy.recent.note(decision, proxy.clock())
        proxy.metrics.decisions.counts[(decision.reason.value,)] += 1
        proxy.metrics.matched_blocks.observe(decision.matched_blocks)

    def _log_answer(self, decision: Decision) -> None:
        logger.debug(
            "answered",
            request_id=self.client.request_id.decode("latin-1"),
            path=self.request.target,
            status=self.status,
            worker=decision.worker_id,
            reason=decision.reason.value,
            matched_blocks=decision.matched_blocks,
            prompt_blocks=decision.prompt_blocks,
            predicted_ttft=decision.predicted_ttft,
            attempts=self.retries.sent,
            seconds=self.proxy.clock() - self.client.arrived,
        )

    # --- choosing a worker ---

    async def _choose(self) -> Decision | None:
        """The next worker; None if none became ready in time."""
        proxy, record = self.proxy, self.client.record
        while True:
            now = proxy.clock()
            try:
                if record is None:
                    decision = proxy.fleet.choose(self.client.route, now, self.excluded)
                else:
                    record.choosing(now)
                    decision = proxy.fleet.choose(self.client.route, now, self.excluded, record.looked_up)
                if proxy.admission is None or self.retries.sent:
                    return decision
                if not proxy.admission.must_wait(decision, self.client.route, now):
                    return decision
                return await self._wait(proxy.admission, now)
            except HolderGone:
                self.holder_gone = True
                if now - proxy.started >= SETTLED_AFTER:
                    return None
            except NoWorkerReady as error:
                self.holder_gone, self.retry_after, self.unready = False, error.retry_after, str(error)
            if self.deadline is None:
                self.deadline = now + proxy.policy.deadline
            if now >= self.deadline or self._has_final_answer(now):
                return None
            if (admission := proxy.admission) is not None and self._is_held(admission):
                with contextlib.suppress(NoWorkerReady):  # the worker may have left again by then
                    return await self._wait(admission, now)
                self.deadline = None
                continue
            if asyncio.current_task() is None:
                await within_task()
                continue  # a worker may have become ready in that turn
            pause = min(EXCLUDED_PAUSE if self.excluded else 1.0, self.deadline - now)
            if self.told_to_wait_at is None:
                self.excluded = frozenset()
            proxy.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await proxy.changed.wait()

    def _is_held(self, admission: Admission) -> bool:
        """Whether the request is held until a worker is ready; a stream that its client has begun to read is not."""
        return self.in_flight.state is not RequestState.RESUMING and admission.must_hold(self.client.route)

    async def _wait(self, admission: Admission, now: float) -> Decision:
        """Where the request goes once it is its turn. Only its first attempt waits for room, but any for a worker."""
        record = self.client.record
        try:
            return await admission.turn(self.client.route, len(self.request.body))
        finally:
            if record is not None:
                record.choosing(self.proxy.clock())
                record.waited = record.choosing_at - now

    def _note_failure(self, decision: Decision, failure: AttemptFailure) -> None:
        proxy = self.proxy
        logger.warning(
            "attempt_failed",
            request_id=self.client.request_id.decode("latin-1"),
            worker=decision.url,
            attempt=self.retries.sent,
            cause=failure.cause.value,
            why=failure.why,
        )
        failed = proxy.sharing(decision.url, failure.cause)
        self.excluded |= set(failed)
        now = proxy.clock()
        self.deadline = now + proxy.policy.deadline
        told_to_wait = failure.answer is not None and bool(find(failure.answer[1], b"retry-after"))
        self.told_to_wait_at = now if told_to_wait else None
        if failure.cause is FailureCause.REFUSED:
            proxy.on_refused(decision.url, failure.why)
        elif failure.cause is FailureCause.BUSY:
            proxy.on_busy(decision.url)
        elif failure.cause in FAULTS:
            for url in failed:
                proxy.note(url, Outcome.BAD)

    def _has_final_answer(self, now: float) -> bool:
        """Whether the client gets the last failure's answer now, since there is no other worker, instead of waiting.

        A worker refuses again what it has refused, and a worker that asks for a pause is not asked again before its
        end. But a worker that answers 503 may be draining, and its replacement may become ready soon: whether it drains
        is known after `DRAIN_KNOWN_AFTER`.
        """
        if self.failure is None or self.failure.answer is None:
            return False
        if self.failure.cause is FailureCause.DOUBTED or self.failure.answer[0] == 429:
            return True
        if self.told_to_wait_at is None:
            return False
        try:
            self.proxy.fleet.choose(self.client.route, now)
        except NoWorkerReady:
            # Every worker that was asked drains: wait for others. This is checked all the while, because a worker that
            # comes back at the same address before the pause is over is another process.
            self.told_to_wait_at = None
            return False
        return now >= self.told_to_wait_at + DRAIN_KNOWN_AFTER

    # --- one attempt ---

    async def _attempt(self, decision: Decision) -> AttemptFailure | None:
        """Send to the chosen worker and pass its answer on. After an `AttemptFailure` the client has received nothing,
        or the beginning of a stream that can go on elsewhere."""
        proxy = self.proxy
        response: UpstreamResponse | None = None
        relay: Relay | None = None
        try:
            route = self.client.route
            if self.resumption is not None:
                self.resumption.begin()
            self.request.rank = decision.rank if route.rank is None else route.rank
            ticket = proxy.fleet.dispatch(decision, route, proxy.clock())
            try:
                sent = proxy.clock()
                with proxy.in_flight.at(decision.url, self.in_flight, sent):
                    if route.prompted and self.deadline is None:
                        proxy.metrics.decision_seconds.observe(sent - self.client.arrived)
                    if self.client.record is not None:
                        self.client.record.sent(decision, sent)
                    response = await proxy.upstream.send(decision.url, self._outgoing(decision.url))
                    if self.in_flight.state is RequestState.PENDING:
                        self.status = response.status
                    relay = Relay(
                        self.client,
                        self.request,
                        self.in_flight,
                        decision,
                        response,
                        ticket,
                        proxy.metrics,
                        proxy.clock,
                        proxy.fleet.config.block_size,
                        self.retries.sent,
                        self.resumption,
                    )
                    failure = await relay.run(self._failing(decision.url, response))
            finally:
                ticket.release(proxy.clock(), reused=ticket.served or ticket.answered)
        except UpstreamError as error:
            if relay is not None and self.in_flight.state is RequestState.RESPONDING:
                if await self._goes_on(error.cause):
                    progress = Progress.DECLINED if error.cause is FailureCause.ABORTED else Progress.ANSWERING
                    return AttemptFailure(error.cause, str(error), progress)
                for url in proxy.sharing(decision.url, error.cause):
                    proxy.note(url, Outcome.BAD)
                relay.cut(error)
                return None
            return AttemptFailure(error.cause, str(error), error.progress)
        else:
            if failure is None:
                self._note_answer(decision.url)
            return failure
        finally:
            if response is not None:
                response.close()

    async def _goes_on(self, cause: FailureCause) -> bool:
        """Whether the rest of the stream can come from another worker; then it is what is sent from now on."""
        resumption = self.resumption
        if resumption is None or not await resumption.go_on(cause):
            return False
        self.request = resumption.request()
        self.client = replace(self.client, route=resumption.route(self.client.route))
        return True

    def _outgoing(self, url: str) -> UpstreamRequest:
        """The request as this worker gets it: a response that it may store has an id that names it."""
        request, record = self.request, self.client.record
        if record is not None and record.trace is not None:
            request = replace(request, headers=record.trace.outgoing(request.headers))
        if not self.client.route.stores:
            return request
        return replace(request, body=with_request_id(request.body, response_id(uuid.uuid4().hex, url)))

    def _failing(self, url: str, response: UpstreamResponse) -> FailureCause | None:
        """Why an answer should not reach the client while another worker may have a better one; None: it should."""
        proxy, status = self.proxy, response.status
        if status in (429, 503):
            wait = retry_after(response.headers, datetime.now(UTC))
            for full in proxy.sharing(url, FailureCause.BUSY):
                proxy.note_ejection(full, proxy.fleet.turned_away(full, wait, proxy.clock()))
            return FailureCause.BUSY
        if status >= 500 and status != 501:
            return FailureCause.STATUS_5XX
        if self.in_flight.state is RequestState.CONTINUING:
            # Nothing but a stream can be joined with what the client has.
            streams = find(response.headers, b"content-type").startswith(b"text/event-stream")
            return None if status == 200 and streams else FailureCause.DOUBTED
        if status < 400 or status >= 500 or self.client.route.stored is not None:
            return None
        alike = [other for other, refused in self.doubted.items() if refused == status]
        for other in (*alike, url) if alike else ():
            proxy.refusals.agreed(other, self.kind, status, proxy.clock())
        if alike or not proxy.refusals.doubtful(url, self.kind, status, proxy.clock()):
            return None
        self.doubted[url] = status
        return FailureCause.DOUBTED

    def _note_answer(self, url: str) -> None:
        """The client has received the answer, or as much of it as there was."""
        proxy = self.proxy
        if self.status >= 400:
            return
        if self.in_flight.state is not RequestState.COMPLETE:
            proxy.note(url, Outcome.BAD)
            return
        if self.client.route.prompted:
            proxy.metrics.request_seconds.observe(proxy.clock() - self.client.arrived)
        if proxy.refusals:
            proxy.refusals.answered(url, self.kind)
        proxy.note(url, Outcome.GOOD)
        for other in self.doubted:
            proxy.note(other, Outcome.REFUSED)

    # --- no worker answered ---

    def _answer_without_worker(self) -> None:
        """Answer with the last failure's answer, if there is one, else with an error of the router's own."""
        resuming = self.in_flight.state is RequestState.RESUMING
        self.in_flight.advance(RequestEvent.GIVEN_UP)
        if resuming:
            cause = self.failure.cause if self.failure is not None else FailureCause.BROKEN
            self.proxy.metrics.broken_streams.labels(cause.value).inc()
            if self.client.record is not None:
                self.client.record.cause = cause
            self.client.answer.write(STREAM_BROKEN, last=True)
            return
        if self.failure is not None and self.failure.answer is not None:
            self.status, headers, body = self.failure.answer
            if self.status == 503 and not find(headers, b"retry-after"):
                headers = [*headers, (b"retry-after", b"%d" % ceil(self.retry_after))]
            self.client.answer.whole(self.status, headers, body)
            return
        error = self._no_worker()
        if self.request.target.startswith(MESSAGES):
            error = MessagesError(error)
        self.status = error.status
        headers = [
            (b"x-request-id", self.client.request_id),
            (b"x-kvcluster-attempts", b"%d" % self.retries.sent),
        ]
        if error.status == 503:
            headers.append((b"retry-after", b"%d" % max(1, ceil(self.retry_after))))
        answer_error(self.client.answer, error, headers)

    def _no_worker(self) -> ApiError:
        """The error that says why no worker answered."""
        stored = self.client.route.stored
        if stored is not None and self.holder_gone:
            return response_not_found(stored)
        if self.failure is not None:
            return ApiError(
                503, f"No worker answered this request ({self.retries.sent} tried; the last: {self.failure.why})."
            )
        if stored is not None:
            message = f"The worker that stores response '{stored.name}' cannot answer now: {self.unready}."
            return ApiError(503, f"{message} Try again later.")
        model = self.client.route.model
        if model in self.proxy.fleet.directory.catalogue.missing:
            return ApiError(503, f"No worker has loaded the adapter '{model}' yet. Try again later.")
        return ApiError(503, "No worker is ready to serve this request. Try again later.")
