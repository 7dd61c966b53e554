"""One request's way through the router: choose a worker, send, retry elsewhere, pass the answer on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

import orjson
from starlette.types import Send

from kvcache.errors import ApiError
from kvcache.logs import event
from router.core.decision import Decision, NoWorkerReady, RouteRequest
from router.core.fleet import Fleet
from router.core.recent import RecentDecisions
from router.server.attempts import Attempts
from router.server.headers import Headers, find
from router.server.metrics import Metrics
from router.server.relay import Client, Failure, Relay
from router.server.signal import Signal
from router.server.upstream import Cause, Upstream, UpstreamError, UpstreamRequest, UpstreamResponse

logger = logging.getLogger(__name__)

MAX_BUFFERED = 1 << 20
"""Bytes of an answer that is no stream that are held back, so that the request can still go elsewhere if the worker
dies before the answer is complete."""
EXCLUDED_PAUSE = 0.1
"""Seconds before a request goes to the same worker again because there is no other."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a request is sent around before its client gets an error."""

    attempts: int = 4
    deadline: float = 10.0
    """Seconds since a failure (or since no worker was ready) in which another worker is looked for."""


@dataclass(slots=True)
class Proxy:
    """What every request needs. `refused` and `busy` are told of workers that turned a request away."""

    fleet: Fleet
    upstream: Upstream
    attempts: Attempts
    metrics: Metrics
    recent: RecentDecisions
    clock: Callable[[], float]
    changed: Signal
    """Fires when a worker may have become ready."""
    policy: RetryPolicy
    refused: Callable[[str, str], None]
    busy: Callable[[str], None]

    async def forward(
        self, request: UpstreamRequest, route: RouteRequest, request_id: bytes, arrived: float, send: Send
    ) -> int:
        """Answer one request. Returns the status; raises `OSError` when the client left."""
        return await _Exchange(self, request, Client(route, request_id, arrived, send)).run()


@dataclass(slots=True)
class _Exchange:
    """One request and its answer."""

    proxy: Proxy
    request: UpstreamRequest
    client: Client
    attempts: int = 0
    excluded: set[str] = field(default_factory=set)
    give_up_at: float | None = None
    retry_after: float = 1.0
    failure: Failure | None = None
    status: int = 0

    async def run(self) -> int:
        proxy = self.proxy
        while self.attempts < proxy.policy.attempts:
            decision = await self._choose()
            if decision is None:
                break
            if self.failure is not None:
                proxy.metrics.retries.labels(self.failure.cause.value).inc()
            self.attempts += 1
            if self.client.route.prompted:
                self._count(decision)
            self.failure = await self._attempt(decision)
            if self.failure is None:
                if logger.isEnabledFor(logging.DEBUG):
                    self._log_answer(decision)
                return self.status
            self._note(decision, self.failure)
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
            attempts=self.attempts,
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
            if now >= self.give_up_at:
                return None
            pause = min(EXCLUDED_PAUSE if self.excluded else 1.0, self.give_up_at - now)
            self.excluded.clear()
            await proxy.changed.wait(pause)

    def _note(self, decision: Decision, failure: Failure) -> None:
        proxy = self.proxy
        event(
            logger,
            logging.WARNING,
            "attempt_failed",
            request_id=self.client.request_id.decode("latin-1"),
            worker=decision.url,
            attempt=self.attempts,
            cause=failure.cause.value,
            why=failure.why,
        )
        self.excluded.add(decision.url)
        self.give_up_at = proxy.clock() + proxy.policy.deadline
        if failure.cause is Cause.REFUSED:
            proxy.refused(decision.url, failure.why)
        elif failure.cause is Cause.BUSY:
            proxy.busy(decision.url)

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
                    decision,
                    response,
                    attempt,
                    ticket,
                    proxy.metrics,
                    proxy.clock,
                    proxy.fleet.config.block_size,
                    self.attempts,
                )
                return await relay.run()
        except UpstreamError as error:
            if relay is not None and relay.begun:
                await relay.cut(error)
                return None
            return Failure(error.cause, str(error))
        finally:
            if response is not None:
                response.close()

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
            message = f"No worker answered this request ({self.attempts} tried; the last: {self.failure.why})."
        self.status = 503
        await answer_error(
            self.client.send,
            ApiError(503, message),
            [
                (b"retry-after", b"%d" % max(1, ceil(self.retry_after))),
                (b"x-request-id", self.client.request_id),
                (b"x-kvcluster-attempts", b"%d" % self.attempts),
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
