"""Passes one worker's answer on to the client, or finds that it is a failure of which the client need not know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from starlette.types import Send

from kvcache.errors import SSE_DONE, engine_dead, sse_error
from router.core.decision import Decision, RouteRequest
from router.core.fleet import Ticket
from router.core.latency_samples import Cost
from router.metrics import Metrics
from router.server.answer import AnswerStream, Stage, WholeAnswer, read_answer
from router.server.headers import find, to_client
from router.server.usage import Usage, UsageFinder
from router.upstream.in_flight import NOT_WAITING, Attempt
from router.upstream.interface import Cause, Progress, UpstreamError, UpstreamRequest, UpstreamResponse
from runtime.http.context import Headers
from runtime.http.server import AnswerAborted
from runtime.logs import event

logger = logging.getLogger(__name__)

MAX_BUFFERED = 1 << 20
"""Bytes of an answer that is no stream that are held back, so that the request can still go elsewhere if the worker
dies before the answer is complete."""
MAX_CLIENT_SHARE = 0.1
"""Of an answer's time that waited for the client, for it to show how fast the engine is."""

_DECLINED = frozenset({Cause.BUSY, Cause.ABORTED, Cause.DOUBTED})
"""Failures that the worker itself calls one, before or instead of acting on the request."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that may be repeated elsewhere; `answer` is what the client gets if it cannot."""

    cause: Cause
    why: str
    progress: Progress
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
    request: UpstreamRequest
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
    client_seconds: float = 0.0
    """That the client took to read."""
    broken: Cause | None = None
    """Why the client has had less than a whole answer."""

    async def run(self, failing: Cause | None) -> Failure | None:
        """Pass the answer on, unless its status says that it should not be (`failing`). A `Failure` means that nothing
        went to the client.

        Raises `UpstreamError` when the worker fails; if the client has had a byte by then (`begun`), `cut` is next.
        """
        if failing is not None:
            return await self._failed_answer(failing, f"status {self.response.status}", b"")
        if find(self.response.headers, b"content-type").startswith(b"text/event-stream"):
            return await self._stream()
        return await self._whole()

    async def _failed_answer(self, cause: Cause, why: str, body: bytes) -> Failure:
        """A failure with the answer that says so, which the client gets if no other worker has a better one."""
        progress = Progress.DECLINED if cause in _DECLINED else Progress.ANSWERING
        while piece := await self.response.read():
            body += piece
            if len(body) > MAX_BUFFERED:
                return Failure(cause, why, progress)
        headers = self._headers()
        if body or not find(headers, b"content-length"):  # an answer to HEAD has the length of what GET would get
            headers = [header for header in headers if header[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
        return Failure(cause, why, progress, (self.response.status, headers, body))

    async def _stream(self) -> Failure | None:
        """Pass on server-sent events, whole ones only: a stream that breaks off ends at the end of an event.

        The head goes with the first comment or the first event with content, whichever comes first. After a comment the
        request cannot go elsewhere: its client has been told who answers.
        """
        response, attempt, clock = self.response, self.attempt, self.clock
        self.streaming = True
        stream, now = AnswerStream(), clock()
        try:
            while piece := await response.read():
                now = clock()
                before = stream.stage
                passed = stream.push(piece)
                if stream.stage.broken and not self.begun:
                    cause = Cause.ERROR_EVENT if stream.stage is Stage.FAILED else Cause.ABORTED
                    return await self._failed_answer(cause, "its stream began with a failure", passed + stream.finish())
                if stream.stage is Stage.ANSWERING and stream.stage is not before:
                    self._first_token(now)
                # Comments are no progress: a server writes them while its engine hangs.
                if stream.stage is not Stage.SILENT:
                    attempt.since = now
                if passed:
                    await self._pass_on(passed)
            rest = stream.finish()
            if stream.stage is Stage.SILENT and not rest:
                raise UpstreamError(Cause.BROKEN, "the stream ended before its first event", Progress.ANSWERING)
            await self._pass_on(rest, last=True)
        finally:
            if self.begun:
                self._count(stream.usage)
        if stream.stage is Stage.ANSWERING:
            self._learn(stream.usage, now)
        if stream.stage.broken:
            self._note_broken(Cause.ERROR_EVENT, "its stream holds an error")
        return None

    def _first_token(self, now: float) -> None:
        if self.response.status < 400:
            self.ticket.served = True
            self.ticket.first_token(now)
        if self.response.status == 200:
            self.metrics.ttft.observe(now - self.client.arrived)
            self.metrics.predicted_ttft.observe(self.decision.predicted_ttft)

    async def _whole(self) -> Failure | None:
        """Pass on an answer that is no stream: once it is complete, unless it is large."""
        response, attempt, clock = self.response, self.attempt, self.clock
        body = b""
        while piece := await response.read():
            attempt.since = clock()
            body = body + piece if body else piece
            if len(body) > MAX_BUFFERED:
                break
        answer = WholeAnswer() if piece or response.status != 200 else read_answer(body)
        if answer.aborted:
            return await self._failed_answer(Cause.ABORTED, "its engine aborted the request", body)
        finder = UsageFinder()
        while piece:
            finder.push(body)
            await self._pass_on(body)
            body = piece = await response.read()
            attempt.since = clock()
        self.ticket.served = response.status < 400
        if answer.choices == 1:
            self._learn(answer.usage, clock())
        await self._pass_on(body, last=True)
        if response.status == 200:
            self._count(answer.usage or finder.usage)
        return None

    async def _pass_on(self, data: bytes, *, last: bool = False) -> None:
        """Send bytes to the client, after the head if they are the first. The time that the client takes to read is not
        held against the worker."""
        attempt, clock = self.attempt, self.clock
        began, since = clock(), attempt.since
        attempt.since = NOT_WAITING
        if not self.begun:
            await self._begin()
        await self.client.send({"type": "http.response.body", "body": data, "more_body": not last})
        took = clock() - began
        self.client_seconds += took
        attempt.since = NOT_WAITING if last else since + took

    async def _begin(self) -> None:
        """The point of no return: status and headers go to the client."""
        self.attempt.answered = self.begun = True
        self.request.drop_body()
        status, headers = self.response.status, self._headers()
        await self.client.send({"type": "http.response.start", "status": status, "headers": headers})

    def _headers(self) -> Headers:
        decision = self.decision
        added = [
            (b"x-kvcluster-worker", _header_value(decision.worker_id)),
            (b"x-kvcluster-reason", decision.reason.value.encode()),
            (b"x-kvcluster-strategy", decision.strategy.encode()),
            (b"x-kvcluster-attempts", b"%d" % self.attempts),
        ]
        if self.client.route.prompted:
            added.append((b"x-kvcluster-matched-blocks", b"%d" % decision.matched_blocks))
        return to_client(self.response.headers, self.client.request_id, added)

    def _count(self, usage: Usage | None) -> None:
        """Predicted against reported cached tokens, of answers that report them: of others neither side counts."""
        if usage is None or usage.cached is None:
            return
        metrics = self.metrics
        metrics.predicted_cached.inc(self.decision.reported_blocks * self.block_size)
        metrics.reported_prompt.inc(usage.prompt)
        metrics.actual_cached.inc(usage.cached)

    def _learn(self, usage: Usage | None, now: float) -> None:
        """The answer of one sequence is complete: its time shows how fast the engine is, unless it is the client's."""
        slow_client = self.client_seconds > MAX_CLIENT_SHARE * (now - self.client.arrived)
        if usage is not None and self.client.route.reported is None and not slow_client:
            self.ticket.finished(now, Cost(usage.prompt, usage.completion, usage.cached))

    async def cut(self, error: UpstreamError) -> None:
        """The worker failed after the first byte: say so in the stream as vLLM does, or break the answer off."""
        self._note_broken(error.cause, str(error))
        if not self.streaming:
            raise AnswerAborted(str(error))
        await self.client.send({"type": "http.response.body", "body": sse_error(engine_dead().body()) + SSE_DONE})

    def _note_broken(self, cause: Cause, why: str) -> None:
        self.broken = cause
        self.metrics.broken_streams.labels(cause.value).inc()
        event(
            logger,
            logging.WARNING,
            "answer_broken",
            request_id=self.client.request_id.decode("latin-1"),
            cause=cause.value,
            why=why,
        )


@lru_cache(maxsize=4096)
def _header_value(text: str) -> bytes:
    """A worker names itself: whatever it says must fit a header."""
    return re.sub(r"[^\x21-\x7e]", "?", text).encode()
