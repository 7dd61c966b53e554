"""Passes one worker's answer on to the client, or finds a failure that the client need not see."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from kvcache.errors import SSE_DONE, engine_dead, messages_error, sse_error
from router.core.decision import Decision, DecisionReason, RouteRequest
from router.core.fleet import Ticket
from router.core.latency_samples import Usage
from router.core.retries import FailureCause, Progress
from router.metrics import OVER, UNDER, Metrics
from router.server.answer import AnswerStream, StreamState, UsageFinder, WholeAnswer, read_answer
from router.server.auth import Admitted
from router.server.client_answer import ClientAnswer
from router.server.headers import find, to_client
from router.server.prompts import MESSAGES
from router.server.record import RequestRecord
from router.server.resumption import Resumption
from router.upstream.in_flight import AWAITING, NOT_WAITING, InFlightRequest, RequestEvent, RequestState
from router.upstream.interface import UpstreamError, UpstreamRequest, UpstreamResponse
from runtime.http.context import Headers
from runtime.http.server import AnswerAborted
from runtime.logs import EventLogger

logger = EventLogger(__name__)

MAX_BUFFERED = 1 << 20
"""Bytes that are held back of an answer that is not a stream, so that the request can still go to another worker if
this one dies before the answer is complete."""
MAX_CLIENT_SHARE = 0.1
"""An answer shows how fast the engine is only if at most this share of its time was spent waiting for the client."""

STREAM_BROKEN = sse_error(engine_dead().body()) + SSE_DONE
"""The end of a stream whose worker has failed, as vLLM writes it."""
MESSAGES_BROKEN = messages_error(engine_dead().message)
"""The same for the Messages API, whose clients pass events without a name over."""

EVENT_END = b"\n\n"
"""The end of an event as every engine known here writes it."""

_DECLINED = frozenset({FailureCause.BUSY, FailureCause.ABORTED, FailureCause.DOUBTED})
"""The worker itself says that it did not act on the request."""


def count_cached(
    metrics: Metrics, decision: Decision, ticket: Ticket, usage: Usage | None, block_size: int, now: float
) -> None:
    """Count predicted and reported cached tokens of an answer that reports them; of others neither is counted."""
    if usage is None or usage.cached is None:
        return
    predicted = decision.reported_blocks * block_size
    metrics.predicted_cached.value += predicted
    metrics.reported_prompt.value += usage.prompt
    metrics.actual_cached.value += usage.cached
    if predicted != usage.cached:
        direction = OVER if predicted > usage.cached else UNDER
        metrics.mispredicted_cached.counts[direction] += abs(predicted - usage.cached)
    metrics.prefill_saved.value += ticket.reported(usage.prompt, usage.cached, now)


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """An attempt that may be repeated at another worker, or continued there. `answer` is what the client gets if no
    other worker can, and if it has received nothing yet."""

    cause: FailureCause
    why: str
    progress: Progress
    answer: tuple[int, Headers, bytes] | None = None
    """Status, headers and body."""


@dataclass(slots=True)
class Client:
    """The client's side of a request. `arrived` is a time on the router's clock."""

    route: RouteRequest
    request_id: bytes
    arrived: float
    answer: ClientAnswer
    record: RequestRecord | None = None
    """Where to write what happens, if anything reads it."""
    admitted: Admitted | None = None
    """Where to write what it uses, if it was admitted with a key."""


@dataclass(slots=True)
class Relay:
    """One worker's answer on its way to the client. `attempts`: how many workers were asked, this one included."""

    client: Client
    request: UpstreamRequest
    in_flight: InFlightRequest
    decision: Decision
    response: UpstreamResponse
    ticket: Ticket
    metrics: Metrics
    clock: Callable[[], float]
    block_size: int
    attempts: int
    resumption: Resumption | None = None
    """How the stream goes on elsewhere if the worker fails; None: it does not."""
    streaming: bool = False
    """The answer is a stream of server-sent events."""
    client_seconds: float = 0.0
    """Time spent waiting for the client to read."""
    first_at: float = 0.0
    """When this worker's first token came, if it did."""
    stream: AnswerStream = field(init=False)
    """What has come of a stream."""
    last_at: float = 0.0
    """When its last piece came."""
    events: int = 0
    """Events from the first with content on."""
    first_events: int = 0
    """Those of them that came with the first."""
    unsent: bytes = b""
    """Of a stream that failed before it began."""

    async def run(self, failing: FailureCause | None) -> AttemptFailure | None:
        """Pass the answer on, unless its status says that it should not be (`failing`). After an `AttemptFailure`
        nothing of this answer has been sent to the client.

        Raises `UpstreamError` when the worker fails. If the request is `RESPONDING` by then, the caller calls `cut`.
        """
        if failing is not None:
            return await self._failed_answer(failing, f"status {self.response.status}", b"")
        if find(self.response.headers, b"content-type").startswith(b"text/event-stream"):
            return await self._stream()
        return await self._whole()

    async def _failed_answer(self, cause: FailureCause, why: str, body: bytes) -> AttemptFailure:
        """A failure with the answer that reports it, which the client gets if no other worker has a better one."""
        progress = Progress.DECLINED if cause in _DECLINED else Progress.ANSWERING
        while piece := await self.response.read():
            body += piece
            if len(body) > MAX_BUFFERED:
                return AttemptFailure(cause, why, progress)
        headers = self._headers()
        if body or not find(headers, b"content-length"):  # the answer to HEAD states the length of the answer to GET
            headers = [header for header in headers if header[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
        return AttemptFailure(cause, why, progress, (self.response.status, headers, body))

    async def _stream(self) -> AttemptFailure | None:
        """Pass on server-sent events. Only whole events are passed on: a stream that breaks off ends after an event.

        The head is sent with the first comment or the first event with content, whichever comes first. After a comment
        the request cannot go to another worker: the client has been told which worker answers.
        """
        in_flight, resumption = self.in_flight, self.resumption
        self.streaming = True
        self.stream = stream = AnswerStream() if resumption is None else AnswerStream(resumption.MAX_HELD)
        self.last_at = self.clock()
        try:
            while not await self.response.pass_on(self._piece):
                if stream.state.is_failure and in_flight.state in AWAITING:
                    cause = FailureCause.ABORTED if stream.state is StreamState.ABORTED else FailureCause.ERROR_EVENT
                    held = self.unsent + stream.finish()
                    return await self._failed_answer(cause, "its stream began with a failure", held)
                if resumption is not None and resumption.failure is not None:
                    raise UpstreamError(resumption.failure, "it says that it failed", Progress.ANSWERING)
                if resumption is not None and resumption.stopped:
                    break
                await self._drain()
            rest = stream.finish()
            if resumption is not None and not resumption.ended:
                raise UpstreamError(FailureCause.BROKEN, "the stream ended before its last event", Progress.ANSWERING)
            if stream.state is StreamState.SILENT and not rest:
                raise UpstreamError(FailureCause.BROKEN, "the stream ended before its first event", Progress.ANSWERING)
            # After the end of a stream that may go on, the worker's events are no part of what the client reads.
            self._pass_on(rest if resumption is None else b"", last=True)
        finally:
            if self.client.admitted is not None and stream.state is StreamState.ANSWERING:
                self.client.admitted.events += self.events
            if in_flight.state not in AWAITING:
                self._count(stream.usage)
        if stream.state is StreamState.ANSWERING:
            self._learn(stream.usage, self.last_at)
            self._count_tokens(stream.usage, self.events - self.first_events, self.last_at)
        if stream.state.is_failure:
            self._broken(FailureCause.ERROR_EVENT, "its stream holds an error")
        else:
            in_flight.advance(RequestEvent.ANSWER_COMPLETE)
        return None

    def _piece(self, piece: bytes) -> bool:
        """Pass on what is whole with this piece of a stream, within the callback that has brought it. Returns whether
        the next piece may come; if not, `_stream` has to do something first."""
        stream = self.stream
        self.last_at = now = self.clock()
        before = stream.state
        passed = stream.push(piece)
        state = stream.state
        if state is not before:
            if state.is_failure and self.in_flight.state in AWAITING:
                self.unsent = passed
                return False
            if state is StreamState.ANSWERING:
                self._first_token(now)
                self.first_events = passed.count(EVENT_END)
        # Comments are no progress: a server writes them while its engine hangs.
        if state is not StreamState.SILENT:
            self.in_flight.waiting_since = now
        if not passed:
            return True
        if state is StreamState.ANSWERING:
            self.events += passed.count(EVENT_END)
        resumption = self.resumption
        if resumption is None:
            return self._pass_on(passed)
        writable = True
        if passed := resumption.push(passed):
            writable = self._pass_on(passed)
        return writable and resumption.failure is None and not resumption.stopped

    def _first_token(self, now: float) -> None:
        if self.response.status < 400:
            self.ticket.served = True
            self.ticket.first_token(now)
        self.first_at = now
        if self.in_flight.state is RequestState.CONTINUING:
            return
        if self.response.status == 200:
            if self.client.record is not None:
                self.client.record.first_token_at = now
            ttft, predicted = now - self.client.arrived, self.decision.predicted_ttft
            self.metrics.ttft[self.decision.cache_use].observe(ttft)
            self.metrics.predicted_ttft.observe(predicted)
            if predicted > 0.0:
                self.metrics.ttft_ratio.observe(ttft / predicted)

    async def _whole(self) -> AttemptFailure | None:
        """Pass on an answer that is not a stream: once it is complete, unless it is larger than `MAX_BUFFERED`."""
        response, in_flight, clock = self.response, self.in_flight, self.clock
        body = b""
        while piece := await response.read():
            in_flight.waiting_since = clock()
            body = body + piece if body else piece
            if len(body) > MAX_BUFFERED:
                break
        answer = WholeAnswer() if piece or response.status != 200 else read_answer(body)
        if answer.aborted:
            return await self._failed_answer(FailureCause.ABORTED, "its engine aborted the request", body)
        finder = UsageFinder()
        while piece:
            finder.push(body)
            if not self._pass_on(body):
                await self._drain()
            body = piece = await response.read()
            in_flight.waiting_since = clock()
        self.ticket.served = response.status < 400
        if answer.choices == 1:
            self._learn(answer.usage, clock())
        self._pass_on(body, last=True)
        if response.status == 200:
            self._count(answer.usage or finder.usage)
        in_flight.advance(RequestEvent.ANSWER_COMPLETE)
        return None

    def _pass_on(self, data: bytes, *, last: bool = False) -> bool:
        """Send bytes to the client, after the head if they are the first. Returns whether it takes more."""
        if self.in_flight.state in AWAITING:
            self._begin()
        if last:
            self.in_flight.waiting_since = NOT_WAITING
        return self.client.answer.write(data, last=last)

    async def _drain(self) -> None:
        """Wait until the client takes more. This is no time in which the worker sent nothing."""
        began, since = self.clock(), self.in_flight.waiting_since
        self.in_flight.waiting_since = NOT_WAITING
        await self.client.answer.drain()
        took = self.clock() - began
        self.client_seconds += took
        self.in_flight.waiting_since = since + took

    def _begin(self) -> None:
        """Send status and headers to the client, unless it has them from a worker that failed. From now on the whole
        request cannot go to another worker."""
        began = self.in_flight.state is RequestState.PENDING
        self.in_flight.advance(RequestEvent.ANSWER_BEGUN)
        self.request.drop_body()
        if not began:
            if self.resumption is not None and self.resumption.cause is not None:
                self.metrics.resumed_streams.labels(self.resumption.cause.value).inc()
            return
        self.client.answer.begin(self.response.status, self._headers())

    def _headers(self) -> Headers:
        added = explained(self.decision, self.client.route)
        added.append((b"x-kvcluster-attempts", b"%d" % self.attempts))
        return to_client(self.response.headers, self.client.request_id, added)

    def _count(self, usage: Usage | None) -> None:
        """Count predicted and reported cached tokens of an answer that reports them; of others neither is counted."""
        if self.client.record is not None:
            self.client.record.usage = usage
        if self.client.admitted is not None and usage is not None:
            self.client.admitted.usage = usage
        count_cached(self.metrics, self.decision, self.ticket, usage, self.block_size, self.clock())

    def _count_tokens(self, usage: Usage | None, events: int, now: float) -> None:
        """Count the time between the tokens of a complete stream. One that does not state how many it has is taken to
        have one in each of its `events` since the first with content, the last of which is the end."""
        stated = usage.completion if usage is not None else None
        following = stated - 1 if stated is not None else events - 1
        if following > 0:
            self.metrics.tpot.observe((now - self.first_at) / following)

    def _learn(self, usage: Usage | None, now: float) -> None:
        """Report the time of a complete answer of one sequence, which shows how fast the engine is; not if much of
        that time was the client's."""
        slow_client = self.client_seconds > MAX_CLIENT_SHARE * (now - self.client.arrived)
        if usage is not None and self.client.route.reported is None and not slow_client:
            self.ticket.finished(now, usage)

    def cut(self, error: UpstreamError) -> None:
        """The worker failed after the first byte: report it in the stream as vLLM does, or break the answer off. Only
        the end of a stream can be missing that has said all: then the stream is ended here."""
        closing = self.resumption.closing() if self.resumption is not None else None
        if closing is not None:
            self.in_flight.advance(RequestEvent.ANSWER_COMPLETE)
            self.client.answer.write(closing, last=True)
            return
        self._broken(error.cause, str(error))
        if not self.streaming:
            raise AnswerAborted(str(error))
        messages = self.request.target.partition("?")[0] == MESSAGES
        self.client.answer.write(MESSAGES_BROKEN if messages else STREAM_BROKEN, last=True)

    def _broken(self, cause: FailureCause, why: str) -> None:
        self.in_flight.advance(RequestEvent.ANSWER_BROKEN)
        self.metrics.broken_streams.labels(cause.value).inc()
        if self.client.record is not None:
            self.client.record.cause = cause
        logger.warning(
            "answer_broken",
            request_id=self.client.request_id.decode("latin-1"),
            cause=cause.value,
            why=why,
        )


def explained(decision: Decision, route: RouteRequest) -> Headers:
    """Headers of an answer that say who gave it, and why."""
    added = [*_explaining(decision.worker_id, decision.reason, decision.strategy)]
    if route.prompted:
        added.append((b"x-kvcluster-matched-blocks", b"%d" % decision.matched_blocks))
    return added


@lru_cache(maxsize=4096)
def _explaining(worker_id: str, reason: DecisionReason, strategy: str) -> tuple[tuple[bytes, bytes], ...]:
    # A worker chooses its name itself: it is put into a form that fits a header.
    return (
        (b"x-kvcluster-worker", re.sub(r"[^\x21-\x7e]", "?", worker_id).encode()),
        (b"x-kvcluster-reason", reason.value.encode()),
        (b"x-kvcluster-strategy", strategy.encode()),
    )
