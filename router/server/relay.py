"""Passes one worker's answer on to the client, or finds that it is a failure of which the client need not know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from starlette.types import Send

from kvcache.errors import SSE_DONE, engine_dead, sse_error
from kvcache.logs import event
from kvcache.serving import AnswerCut
from router.core.decision import Decision, RouteRequest
from router.core.fleet import Ticket
from router.server.answer import MAX_HELD, Verdict, cached_tokens, complete_events, judge_stream, was_aborted
from router.server.attempts import NOT_WAITING, Attempt
from router.server.headers import Headers, find, to_client
from router.server.metrics import Metrics
from router.server.upstream import Cause, UpstreamError, UpstreamResponse

logger = logging.getLogger(__name__)

MAX_BUFFERED = 1 << 20
"""Bytes of an answer that is no stream that are held back, so that the request can still go elsewhere if the worker
dies before the answer is complete."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that may be repeated elsewhere; `answer` is what the client gets if it cannot."""

    cause: Cause
    why: str
    answer: tuple[int, Headers, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """Who asked, when (on the router's clock) and what, and how to answer."""

    route: RouteRequest
    request_id: bytes
    arrived: float
    send: Send


@dataclass(slots=True)
class Relay:
    """One worker's answer on its way to the client. `attempts`: how many workers were asked, this one included."""

    client: Client
    decision: Decision
    response: UpstreamResponse
    attempt: Attempt
    ticket: Ticket
    metrics: Metrics
    clock: Callable[[], float]
    block_size: int
    attempts: int
    begun: bool = False
    """A byte has gone to the client."""
    streaming: bool = False

    async def run(self) -> Failure | None:
        """Pass the answer on. A `Failure` means that nothing went to the client.

        Raises `UpstreamError` when the worker fails; if the client has had a byte by then (`begun`), `cut` is next.
        """
        status = self.response.status
        if status >= 500 and status != 501:
            cause = Cause.BUSY if status == 503 else Cause.STATUS_5XX
            return await self._failed_answer(cause, f"status {status}", b"")
        if find(self.response.headers, b"content-type").startswith(b"text/event-stream"):
            return await self._stream()
        return await self._whole()

    async def _failed_answer(self, cause: Cause, why: str, body: bytes) -> Failure:
        """A failure with the answer that says so, which the client gets if no other worker has a better one."""
        while piece := await self.response.read():
            body += piece
            if len(body) > MAX_BUFFERED:
                return Failure(cause, why)
        headers = [header for header in self._headers() if header[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        return Failure(cause, why, (self.response.status, headers, body))

    async def _stream(self) -> Failure | None:
        """Pass on server-sent events, whole ones only: a stream that breaks off ends at the end of an event."""
        response, attempt, clock, send = self.response, self.attempt, self.clock, self.client.send
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
                self.ticket.first_byte(now)
                first_byte_at = now
            held += piece
            verdict = judge_stream(held)
            if verdict is Verdict.PASS:
                break
            if verdict is not Verdict.WAIT:
                cause = Cause.ERROR_EVENT if verdict is Verdict.ERROR else Cause.ABORTED
                return await self._failed_answer(cause, "its stream began with a failure", held)
        if response.status == 200:
            self.metrics.ttft.observe(first_byte_at - self.client.arrived)
            self.metrics.predicted_ttft.observe(self.decision.predicted_ttft)
        cached: int | None = None
        await self._begin()
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
        self._count_cached(cached)
        return None

    async def _whole(self) -> Failure | None:
        """Pass on an answer that is no stream: once it is complete, unless it is large."""
        response, attempt, clock, send = self.response, self.attempt, self.clock, self.client.send
        body = b""
        while piece := await response.read():
            attempt.since = clock()
            body = body + piece if body else piece
            if len(body) > MAX_BUFFERED:
                break
        if not piece and response.status == 200 and was_aborted(body):
            return await self._failed_answer(Cause.ABORTED, "its engine aborted the request", body)
        await self._begin()
        while piece:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            attempt.since = clock()
            body = piece = await response.read()
            attempt.since = NOT_WAITING
        await send({"type": "http.response.body", "body": body})
        if response.status == 200:
            self._count_cached(cached_tokens(body))
        return None

    async def _begin(self) -> None:
        """The point of no return: status and headers go to the client."""
        self.ticket.served = self.response.status < 400
        self.attempt.answered = self.begun = True
        self.attempt.since = NOT_WAITING
        headers = self._headers()
        await self.client.send({"type": "http.response.start", "status": self.response.status, "headers": headers})

    def _headers(self) -> Headers:
        decision = self.decision
        added = [
            (b"x-kvcluster-worker", _header_value(decision.worker_id)),
            (b"x-kvcluster-reason", decision.reason.value.encode()),
            (b"x-kvcluster-matched-blocks", b"%d" % decision.matched_blocks),
            (b"x-kvcluster-strategy", decision.strategy.encode()),
            (b"x-kvcluster-attempts", b"%d" % self.attempts),
        ]
        return to_client(self.response.headers, self.client.request_id, added)

    def _count_cached(self, actual: int | None) -> None:
        """Predicted against actual cached tokens, for requests whose answers report the latter."""
        tokens = self.client.route.prompt_tokens
        if actual is None or tokens is None:
            return
        metrics = self.metrics
        # The last token is always recomputed, so a block that ends with it cannot be reused (vLLM rule 8).
        block_size = self.block_size
        metrics.predicted_cached.inc(min(self.decision.matched_blocks, max(tokens - 1, 0) // block_size) * block_size)
        metrics.reported_prompt.inc(tokens)
        metrics.actual_cached.inc(actual)

    async def cut(self, error: UpstreamError) -> None:
        """The worker failed after the first byte: say so in the stream as vLLM does, or break the answer off."""
        self.metrics.broken_streams.labels(error.cause.value).inc()
        event(
            logger,
            logging.WARNING,
            "answer_broken",
            request_id=self.client.request_id.decode("latin-1"),
            cause=error.cause.value,
            why=str(error),
        )
        if not self.streaming:
            raise AnswerCut(str(error))
        await self.client.send({"type": "http.response.body", "body": sse_error(engine_dead().body()) + SSE_DONE})


@lru_cache(maxsize=4096)
def _header_value(text: str) -> bytes:
    """A worker names itself: whatever it says must fit a header."""
    return re.sub(r"[^\x21-\x7e]", "?", text).encode()
