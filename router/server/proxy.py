"""One request's way through the router: choose a worker, send, retry elsewhere, pass the answer on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil

import orjson
from starlette.types import Send

from kvcache.errors import ApiError
from router.core.decision import Decision, NoWorkerReady, RecentDecisions, RouteRequest
from router.core.fleet import Fleet
from router.core.outliers import Ejection, Outcome
from router.core.retries import Refusals, RequestKind, Retries, RetryBudget, RetryPolicy
from router.metrics import Metrics
from router.server.headers import find, retry_after
from router.server.relay import Client, Failure, Relay
from router.upstream.in_flight import Attempts
from router.upstream.interface import Cause, Upstream, UpstreamError, UpstreamRequest, UpstreamResponse
from runtime.http.context import Headers
from runtime.logs import event

logger = logging.getLogger(__name__)

EXCLUDED_PAUSE = 0.1
"""Seconds before a request goes to the same worker again because there is no other."""
LEAVING_SHOWS = 1.25
"""Seconds after which it is known whether a worker that answered 503 leaves: its /health has been asked."""

_FAULTS = frozenset({Cause.BROKEN, Cause.CONNECT, Cause.STATUS_5XX, Cause.ERROR_EVENT, Cause.TIMEOUT, Cause.STALLED})
"""What counts against a worker. Being full, leaving or not being there does not: that is seen by other means."""


@dataclass(slots=True)
class Proxy:
    """What every request needs. `refused` and `busy` are told of workers that turned a request away."""

    fleet: Fleet
    upstream: Upstream
    attempts: Attempts
    metrics: Metrics
    recent: RecentDecisions
    clock: Callable[[], float]
    changed: asyncio.Event
    """Set when a worker may have become ready. Whoever waits for that clears it first."""
    policy: RetryPolicy
    budget: RetryBudget
    refusals: Refusals
    refused: Callable[[str, str], None]
    busy: Callable[[str], None]

    async def forward(
        self, request: UpstreamRequest, route: RouteRequest, request_id: bytes, arrived: float, send: Send
    ) -> int:
        """Answer one request. Returns the status; raises `OSError` when the client left."""
        self.budget.request(arrived)
        retries = Retries(self.policy, self.budget, repeatable=request.repeatable)
        kind = RequestKind(request.method, request.target.partition("?")[0], route.model)
        return await _Exchange(self, request, Client(route, request_id, arrived, send), retries, kind).run()

    def note(self, url: str, outcome: Outcome) -> None:
        """Tell the fleet how a worker dealt with a request, and everybody else when it is ejected for that."""
        self.ejected(url, self.fleet.answered(url, outcome, self.clock()))

    def ejected(self, url: str, ejection: Ejection | None) -> None:
        """A worker is left out from now on, if it is."""
        if ejection is None:
            return
        self.metrics.ejections.labels(ejection.reason.value).inc()
        event(
            logger,
            logging.WARNING,
            "worker_ejected",
            worker=url,
            reason=ejection.reason.value,
            why=ejection.why,
            seconds=ejection.seconds,
        )


@dataclass(slots=True)
class _Exchange:
    """One request and its answer."""

    proxy: Proxy
    request: UpstreamRequest
    client: Client
    retries: Retries
    kind: RequestKind
    excluded: set[str] = field(default_factory=set)
    give_up_at: float | None = None
    retry_after: float = 1.0
    failure: Failure | None = None
    asked_to_wait_at: float | None = None
    """When a worker turned the request away and said for how long; None if the last one did not."""
    doubted: dict[str, int] = field(default_factory=dict)
    """URLs of workers whose refusals were doubted, and the statuses."""
    status: int = 0

    async def run(self) -> int:
        proxy, retries = self.proxy, self.retries
        while (decision := await self._choose()) is not None:
            if self.failure is not None:
                proxy.metrics.retries.labels(self.failure.cause.value).inc()
            retries.sent += 1
            if self.client.route.prompted:
                self._count(decision)
            self.failure = await self._attempt(decision)
            if self.failure is None:
                if logger.isEnabledFor(logging.DEBUG):
                    self._log_answer(decision)
                return self.status
            self._note(decision, self.failure)
            broken = self.failure.cause is Cause.BROKEN
            denial = retries.failed(self.failure.progress, proxy.clock(), broken=broken)
            if denial is not None:
                proxy.metrics.retries_denied.labels(denial.value).inc()
                break
        await self._give_up()
        return self.status

    def _count(self, decision: Decision) -> None:
        proxy = self.proxy
        proxy.recent.note(decision, proxy.clock())
        proxy.metrics.decisions.labels(decision.reason.value).inc()
        proxy.metrics.matched_blocks.observe(decision.matched_blocks)

    def _log_answer(self, decision: Decision) -> None:
        event(
            logger,
            logging.DEBUG,
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

    # --- choosing ---

    async def _choose(self) -> Decision | None:
        """The next worker; None when none became ready in time."""
        proxy = self.proxy
        while True:
            now = proxy.clock()
            try:
                return proxy.fleet.choose(self.client.route, now, self.excluded)
            except NoWorkerReady as error:
                self.retry_after = error.retry_after
            if self.give_up_at is None:
                self.give_up_at = now + proxy.policy.deadline
            if now >= self.give_up_at or self._is_answered(now):
                return None
            pause = min(EXCLUDED_PAUSE if self.excluded else 1.0, self.give_up_at - now)
            if self.asked_to_wait_at is None:
                self.excluded.clear()
            proxy.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await proxy.changed.wait()

    def _note(self, decision: Decision, failure: Failure) -> None:
        proxy = self.proxy
        event(
            logger,
            logging.WARNING,
            "attempt_failed",
            request_id=self.client.request_id.decode("latin-1"),
            worker=decision.url,
            attempt=self.retries.sent,
            cause=failure.cause.value,
            why=failure.why,
        )
        self.excluded.add(decision.url)
        now = proxy.clock()
        self.give_up_at = now + proxy.policy.deadline
        asks_to_wait = failure.answer is not None and bool(find(failure.answer[1], b"retry-after"))
        self.asked_to_wait_at = now if asks_to_wait else None
        if failure.cause is Cause.REFUSED:
            proxy.refused(decision.url, failure.why)
        elif failure.cause is Cause.BUSY:
            proxy.busy(decision.url)
        elif failure.cause in _FAULTS:
            proxy.note(decision.url, Outcome.BAD)

    def _is_answered(self, now: float) -> bool:
        """Whether the client gets the last failure's answer, since no other worker is there, rather than wait for one.

        What a worker refuses it refuses again, and one that asks for a pause is not asked again before. But a 503 may
        be said by a worker that leaves, and its replacement may be near: that shows after a moment.
        """
        if self.failure is None or self.failure.answer is None:
            return False
        if self.failure.cause is Cause.DOUBTED or self.failure.answer[0] == 429:
            return True
        if self.asked_to_wait_at is None:
            return False
        try:
            self.proxy.fleet.choose(self.client.route, now)
        except NoWorkerReady:
            # Those that were asked leave: wait for others. Looked at all the while: what comes back at the same address
            # before the time is over is another process.
            self.asked_to_wait_at = None
            return False
        return now >= self.asked_to_wait_at + LEAVING_SHOWS

    # --- one attempt ---

    async def _attempt(self, decision: Decision) -> Failure | None:
        """Send to the chosen worker and pass its answer on. A `Failure` means that nothing went to the client."""
        proxy = self.proxy
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("requests are handled in tasks")
        response: UpstreamResponse | None = None
        relay: Relay | None = None
        try:
            with (
                proxy.fleet.dispatching(decision, self.client.route, proxy.clock) as ticket,
                proxy.attempts.at(decision.url, task, proxy.clock()) as attempt,
            ):
                response = await proxy.upstream.send(decision.url, self.request)
                self.status = response.status
                relay = Relay(
                    self.client,
                    self.request,
                    decision,
                    response,
                    attempt,
                    ticket,
                    proxy.metrics,
                    proxy.clock,
                    proxy.fleet.config.block_size,
                    self.retries.sent,
                )
                failure = await relay.run(self._failing(decision.url, response))
        except UpstreamError as error:
            if relay is not None and relay.begun:
                proxy.note(decision.url, Outcome.BAD)
                await relay.cut(error)
                return None
            return Failure(error.cause, str(error), error.progress)
        else:
            if failure is None:
                self._answered(decision.url, whole=relay.broken is None)
            return failure
        finally:
            if response is not None:
                response.close()

    def _failing(self, url: str, response: UpstreamResponse) -> Cause | None:
        """Why an answer should not reach the client while another worker may have a better one; None: it should."""
        proxy, status = self.proxy, response.status
        if status in (429, 503):
            wait = retry_after(response.headers, datetime.now(UTC))
            proxy.ejected(url, proxy.fleet.turned_away(url, wait, proxy.clock()))
            return Cause.BUSY
        if status >= 500 and status != 501:
            return Cause.STATUS_5XX
        if status < 400 or status >= 500:
            return None
        alike = [other for other, refused in self.doubted.items() if refused == status]
        for other in (*alike, url) if alike else ():
            proxy.refusals.agreed(other, self.kind, status, proxy.clock())
        if alike or not proxy.refusals.doubtful(url, self.kind, status, proxy.clock()):
            return None
        self.doubted[url] = status
        return Cause.DOUBTED

    def _answered(self, url: str, *, whole: bool) -> None:
        """The client has its answer, or the part of it that there was."""
        proxy = self.proxy
        if self.status >= 400:
            return
        if not whole:
            proxy.note(url, Outcome.BAD)
            return
        proxy.refusals.answered(url, self.kind)
        proxy.note(url, Outcome.GOOD)
        for other in self.doubted:
            proxy.note(other, Outcome.REFUSED)

    # --- ends without an answer ---

    async def _give_up(self) -> None:
        if self.failure is not None and self.failure.answer is not None:
            self.status, headers, body = self.failure.answer
            if self.status == 503 and not find(headers, b"retry-after"):
                headers = [*headers, (b"retry-after", b"%d" % ceil(self.retry_after))]
            await self.client.send({"type": "http.response.start", "status": self.status, "headers": headers})
            await self.client.send({"type": "http.response.body", "body": body})
            return
        if self.failure is None:
            message = "No worker is ready to serve this request. Try again later."
        else:
            message = f"No worker answered this request ({self.retries.sent} tried; the last: {self.failure.why})."
        self.status = 503
        await answer_error(
            self.client.send,
            ApiError(503, message),
            [
                (b"retry-after", b"%d" % max(1, ceil(self.retry_after))),
                (b"x-request-id", self.client.request_id),
                (b"x-kvcluster-attempts", b"%d" % self.retries.sent),
            ],
        )


async def answer_error(send: Send, error: ApiError, headers: Headers) -> None:
    """An error of the router's own, in the shape of vLLM and OpenAI."""
    await answer_json(send, error.status, orjson.dumps(error.body()), headers)


async def answer_json(send: Send, status: int, body: bytes, headers: Headers) -> None:
    length = (b"content-length", b"%d" % len(body))
    fields = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
