"""One request's way through the router: choose a worker, send, retry elsewhere, pass the answer on."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

import orjson
from starlette.types import Send

from kvcache.errors import SSE_DONE, ApiError, engine_dead, sse_error
from kvcache.logs import event
from kvcache.serving import AnswerCut
from router.core.decision import Decision, NoWorkerReady, RouteRequest
from router.core.fleet import Fleet, Ticket
from router.core.recent import RecentDecisions
from router.server.answer import MAX_HELD, Verdict, cached_tokens, complete_events, judge_stream, was_aborted
from router.server.attempts import NOT_WAITING, Attempt, Attempts
from router.server.headers import Headers, find, to_client
from router.server.metrics import Metrics
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


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that may be repeated elsewhere; `answer` is what the client gets if it cannot."""

    cause: Cause
    why: str
    answer: tuple[int, Headers, bytes] | None = None


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
        return await _Exchange(self, request, route, request_id, arrived, send).run()


@dataclass(slots=True)
class _Exchange:
    """One request and its answer."""

    proxy: Proxy
    request: UpstreamRequest
    route: RouteRequest
    request_id: bytes
    arrived: float
    send: Send
    attempts: int = 0
    excluded: set[str] = field(default_factory=set)
    give_up_at: float | None = None
    retry_after: float = 1.0
    failure: Failure | None = None
    status: int = 0
    begun: bool = False
    """A byte has gone to the client."""
    streaming: bool = False

    async def run(self) -> int:
        proxy = self.proxy
        while self.attempts < proxy.policy.attempts:
            decision = await self._choose()
            if decision is None:
                break
            if self.failure is not None:
                proxy.metrics.retries.labels(self.failure.cause.value).inc()
            self.attempts += 1
            proxy.recent.note(decision, proxy.clock())
            proxy.metrics.decisions.labels(decision.reason.value).inc()
            proxy.metrics.matched_blocks.observe(decision.matched_blocks)
            self.failure = await self._attempt(decision)
            if self.failure is None:
                if logger.isEnabledFor(logging.DEBUG):
                    self._log_answer(decision)
                return self.status
            self._note(decision, self.failure)
        await self._give_up()
        return self.status

    def _log_answer(self, decision: Decision) -> None:
        event(
            logger,
            logging.DEBUG,
            "answered",
            request_id=self.request_id.decode("latin-1"),
            path=self.request.target,
            status=self.status,
            worker=decision.worker_id,
            reason=decision.reason.value,
            matched_blocks=decision.matched_blocks,
            prompt_blocks=decision.prompt_blocks,
            predicted_ttft=decision.predicted_ttft,
            attempts=self.attempts,
            seconds=self.proxy.clock() - self.arrived,
        )

    # --- choosing ---

    async def _choose(self) -> Decision | None:
        """The next worker; None when none became ready in time."""
        proxy = self.proxy
        while True:
            now = proxy.clock()
            try:
                return proxy.fleet.choose(self.route, now, self.excluded)
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
            request_id=self.request_id.decode("latin-1"),
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
        try:
            with (
                proxy.fleet.dispatching(decision, self.route, proxy.clock) as ticket,
                proxy.attempts.at(decision.url, task, proxy.clock()) as attempt,
            ):
                response = await proxy.upstream.send(decision.url, self.request)
                self.status = response.status
                if response.status >= 500 and response.status != 501:
                    cause = Cause.BUSY if response.status == 503 else Cause.STATUS_5XX
                    return await self._failed_answer(response, decision, cause, f"status {response.status}", b"")
                if find(response.headers, b"content-type").startswith(b"text/event-stream"):
                    return await self._stream(response, decision, attempt, ticket)
                return await self._whole(response, decision, attempt, ticket)
        except UpstreamError as error:
            if self.begun:
                await self._cut(error)
                return None
            return Failure(error.cause, str(error))
        finally:
            if response is not None:
                response.close()

    async def _failed_answer(
        self, response: UpstreamResponse, decision: Decision, cause: Cause, why: str, body: bytes
    ) -> Failure:
        """A failure with the answer that says so, which the client gets if no other worker has a better one."""
        while piece := await response.read():
            body += piece
            if len(body) > MAX_BUFFERED:
                return Failure(cause, why)
        headers = [header for header in self._headers(response, decision) if header[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        return Failure(cause, why, (response.status, headers, body))

    async def _stream(
        self, response: UpstreamResponse, decision: Decision, attempt: Attempt, ticket: Ticket
    ) -> Failure | None:
        """Pass on server-sent events, whole ones only: a stream that breaks off ends at the end of an event."""
        clock, send = self.proxy.clock, self.send
        self.streaming = True
        held = b""
        while True:
            piece = await response.read()
            attempt.since = now = clock()
            if not piece:
                if held:
                    break
                raise UpstreamError(Cause.BROKEN, "the stream ended before its first event")
            if not held:
                ticket.first_byte(now)
                first_byte_at = now
            held += piece
            verdict = judge_stream(held)
            if verdict is Verdict.PASS:
                break
            if verdict is not Verdict.WAIT:
                cause = Cause.ERROR_EVENT if verdict is Verdict.ERROR else Cause.ABORTED
                return await self._failed_answer(response, decision, cause, "its stream began with a failure", held)
        if response.status == 200:
            self.proxy.metrics.ttft.observe(first_byte_at - self.arrived)
            self.proxy.metrics.predicted_ttft.observe(decision.predicted_ttft)
        cached: int | None = None
        await self._begin(response, decision, attempt, ticket)
        while piece:
            if b'"cached_tokens":' in held:
                cached = cached_tokens(held) or cached
            attempt.since = NOT_WAITING
            if held.endswith(b"\n\n"):
                await send({"type": "http.response.body", "body": held, "more_body": True})
                held = b""
            elif end := complete_events(held) or (len(held) if len(held) > MAX_HELD else 0):
                await send({"type": "http.response.body", "body": held[:end], "more_body": True})
                held = held[end:]
            attempt.since = clock()
            piece = await response.read()
            held += piece
        attempt.since = NOT_WAITING
        await send({"type": "http.response.body", "body": held})
        self._count_cached(decision, cached)
        return None

    async def _whole(
        self, response: UpstreamResponse, decision: Decision, attempt: Attempt, ticket: Ticket
    ) -> Failure | None:
        """Pass on an answer that is no stream: once it is complete, unless it is large."""
        clock, send = self.proxy.clock, self.send
        body = b""
        while piece := await response.read():
            attempt.since = clock()
            body = body + piece if body else piece
            if len(body) > MAX_BUFFERED:
                break
        if not piece and response.status == 200 and was_aborted(body):
            return await self._failed_answer(response, decision, Cause.ABORTED, "its engine aborted the request", body)
        await self._begin(response, decision, attempt, ticket)
        while piece:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            attempt.since = clock()
            body = piece = await response.read()
            attempt.since = NOT_WAITING
        await send({"type": "http.response.body", "body": body})
        if response.status == 200:
            self._count_cached(decision, cached_tokens(body))
        return None

    async def _begin(self, response: UpstreamResponse, decision: Decision, attempt: Attempt, ticket: Ticket) -> None:
        """The point of no return: status and headers go to the client."""
        ticket.served = response.status < 400
        attempt.answered = self.begun = True
        attempt.since = NOT_WAITING
        headers = self._headers(response, decision)
        await self.send({"type": "http.response.start", "status": response.status, "headers": headers})

    def _headers(self, response: UpstreamResponse, decision: Decision) -> Headers:
        added = [
            (b"x-kvcluster-worker", _header_value(decision.worker_id)),
            (b"x-kvcluster-reason", decision.reason.value.encode()),
            (b"x-kvcluster-matched-blocks", b"%d" % decision.matched_blocks),
            (b"x-kvcluster-strategy", decision.strategy.encode()),
            (b"x-kvcluster-attempts", b"%d" % self.attempts),
        ]
        return to_client(response.headers, self.request_id, added)

    def _count_cached(self, decision: Decision, actual: int | None) -> None:
        """Predicted against actual cached tokens, for requests whose answers report the latter."""
        tokens = self.route.prompt_tokens
        if actual is None or tokens is None:
            return
        metrics = self.proxy.metrics
        # The last token is always recomputed, so a block that ends with it cannot be reused (vLLM rule 8).
        block_size = self.proxy.fleet.config.block_size
        metrics.predicted_cached.inc(min(decision.matched_blocks, max(tokens - 1, 0) // block_size) * block_size)
        metrics.reported_prompt.inc(tokens)
        metrics.actual_cached.inc(actual)

    # --- ends without an answer ---

    async def _cut(self, error: UpstreamError) -> None:
        """The worker failed after the first byte: say so in the stream as vLLM does, or break the answer off."""
        self.proxy.metrics.broken_streams.labels(error.cause.value).inc()
        event(
            logger,
            logging.WARNING,
            "answer_broken",
            request_id=self.request_id.decode("latin-1"),
            cause=error.cause.value,
            why=str(error),
        )
        if not self.streaming:
            raise AnswerCut(str(error))
        await self.send({"type": "http.response.body", "body": sse_error(engine_dead().body()) + SSE_DONE})

    async def _give_up(self) -> None:
        if self.failure is not None and self.failure.answer is not None:
            self.status, headers, body = self.failure.answer
            if self.status == 503 and not find(headers, b"retry-after"):
                headers = [*headers, (b"retry-after", b"%d" % ceil(self.retry_after))]
            await self.send({"type": "http.response.start", "status": self.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
            return
        if self.failure is None:
            message = "No worker is ready to serve this request. Try again later."
        else:
            message = f"No worker answered this request ({self.attempts} tried; the last: {self.failure.why})."
        self.status = 503
        await answer_error(
            self.send,
            ApiError(503, message),
            [
                (b"retry-after", b"%d" % max(1, ceil(self.retry_after))),
                (b"x-request-id", self.request_id),
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


@lru_cache(maxsize=4096)
def _header_value(text: str) -> bytes:
    """A worker names itself: whatever it says must fit a header."""
    return re.sub(r"[^\x21-\x7e]", "?", text).encode()
