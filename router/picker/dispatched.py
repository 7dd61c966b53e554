"""One request that was sent to a worker through a gateway: its ticket, from the answer of the picker to its release."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from router.core.decision import Decision, RouteRequest
from router.core.errors import UnknownWorker
from router.core.fleet import Fleet
from router.core.latency_samples import Usage
from router.core.outliers import Outcome
from router.core.ticket import Ticket
from router.core.unobserved import Ended, Unobserved
from router.metrics import Metrics
from router.picker.endpoints import endpoint_of
from router.server.answer import MAX_HELD, AnswerStream, StreamState, UsageFinder, WholeAnswer, read_answer
from router.server.auth import Admitted, rate_headers
from router.server.headers import find, retry_after
from router.server.relay import MAX_BUFFERED, count_cached, explained
from runtime.http.context import Headers


class DispatchState(StrEnum):
    """Who knows when the request ends."""

    SENT = "sent"
    """Its answer has not begun."""
    ANSWERING = "answering"
    """Its answer has begun."""
    UNOBSERVED = "unobserved"
    """Nobody says any more how it goes on: the engine's reports show its end (`router.core.unobserved`)."""
    RELEASED = "released"
    """It is over."""


class DispatchEvent(StrEnum):
    """What happens to it."""

    ANSWERED = "answer headers"
    OVER = "answer complete or refused"
    LOST = "gateway's stream ended"


DISPATCH_TRANSITIONS: Mapping[DispatchState, Mapping[DispatchEvent, DispatchState]] = {
    DispatchState.SENT: {
        DispatchEvent.ANSWERED: DispatchState.ANSWERING,
        DispatchEvent.LOST: DispatchState.UNOBSERVED,
    },
    DispatchState.ANSWERING: {
        DispatchEvent.OVER: DispatchState.RELEASED,
        DispatchEvent.LOST: DispatchState.UNOBSERVED,
    },
    DispatchState.UNOBSERVED: {},
    DispatchState.RELEASED: {},
}
"""What is not listed changes nothing."""


@dataclass(slots=True)
class Following:
    """What all such requests need. `on_busy(url)`: look whether that worker still serves."""

    fleet: Fleet
    unobserved: Unobserved
    metrics: Metrics
    clock: Callable[[], float]
    on_busy: Callable[[str], None]
    released: Callable[[Ended], None]
    full: bool = False
    """Answers are followed to their end."""
    explains: bool = False
    """Answers say in headers who gave them, and why, as those of the data port do."""

    def count(self, status: int) -> None:
        """A request is answered with this status."""
        self.metrics.requests.counts[str(status), self.fleet.config.strategy] += 1


@dataclass(slots=True)
class Dispatched:
    """The fleet's account of one request. `urls`: the workers that the gateway was given, the first of them chosen.

    Without its body (`Following.full`) an answer in events shows no first token, so that its request is accounted like
    one that does not stream.
    """

    following: Following
    decision: Decision
    route: RouteRequest
    urls: Sequence[str]
    arrived: float
    admitted: Admitted | None = None
    """The API key that it was admitted with."""
    sent: float = 0.0
    state: DispatchState = DispatchState.SENT
    _ticket: Ticket = field(init=False)
    _stream: AnswerStream | None = None
    _body: bytes = b""
    _finder: UsageFinder | None = None
    _status: int = 0

    def __post_init__(self) -> None:
        if self.route.streaming and not self.following.full:
            self.route = replace(self.route, streaming=False)
        self.sent = self.following.clock()
        self._ticket = self.following.fleet.dispatch(self.decision, self.route, self.sent)

    def _advance(self, event: DispatchEvent) -> bool:
        """Every change of state. Returns whether there was one."""
        state = DISPATCH_TRANSITIONS[self.state].get(event)
        if state is None:
            return False
        self.state = state
        return True

    def answered(self, status: int, headers: Headers, served: str) -> Headers:
        """The answer's headers have come: from `served`, if the gateway says who that was. Returns headers to add."""
        added = rate_headers(self.admitted.limiter, self.following.clock()) if self.admitted is not None else []
        if not self._advance(DispatchEvent.ANSWERED):
            return added
        self._status = status
        self.following.count(status)
        if served and served != endpoint_of(self.decision.url):
            self._move(served)
        if self.following.explains:
            added += explained(self.decision, self.route)
        engine = bool(served) or bool(find(headers, b"x-envoy-upstream-service-time"))
        self._note(status, headers, engine=engine)
        if status >= 400:
            self._release(reused=engine and status < 500)
            return added
        self._ticket.served = True
        streams = find(headers, b"content-type").startswith(b"text/event-stream")
        if self.following.full:
            self._stream = AnswerStream(MAX_HELD) if streams else None
        elif not streams:
            self._release(reused=True)  # engines answer with a whole body once it is there
        return added

    def _note(self, status: int, headers: Headers, *, engine: bool) -> None:
        """Tell the fleet how the worker dealt with the request."""
        following, url, now = self.following, self.decision.url, self.following.clock()
        if engine and status in (429, 503):
            following.fleet.turned_away(url, retry_after(headers, datetime.now(UTC)), now)
            following.on_busy(url)
        elif status >= 500 and status != 501:
            following.fleet.answered(url, Outcome.BAD, now)
            following.on_busy(url)
        elif 0 < status < 400:
            following.fleet.answered(url, Outcome.GOOD, now)

    def _move(self, served: str) -> None:
        """The gateway tried the chosen worker in vain, and another one answers."""
        following, now = self.following, self.following.clock()
        following.fleet.answered(self.decision.url, Outcome.BAD, now)
        following.on_busy(self.decision.url)
        other = next((url for url in self.urls if endpoint_of(url) == served), None)
        if other is None:
            return
        figures = next((each for each in self.decision.candidates if each.url == other), None)
        decision = replace(self.decision, url=other, worker_id=figures.worker_id if figures is not None else other)
        if figures is not None:
            decision = replace(
                decision,
                matched_blocks=figures.matched_blocks,
                loaded_blocks=figures.loaded_blocks,
                reported_blocks=figures.matched_blocks,
                queue_seconds=figures.queue_seconds,
                prefill_seconds=figures.prefill_seconds,
                predicted_ttft=figures.queue_seconds + figures.load_seconds + figures.prefill_seconds,
            )
        try:
            ticket = following.fleet.dispatch(decision, self.route, now)
        except UnknownWorker:
            return
        self._ticket.release(now, reused=False)
        self._ticket, self.decision, self.sent = ticket, decision, now

    def piece(self, data: bytes) -> None:
        """A piece of the answer's body."""
        if self.state is not DispatchState.ANSWERING:
            return
        now = self.following.clock()
        stream = self._stream
        if stream is not None:
            before = stream.state
            stream.push(data)
            if stream.state is not before and stream.state is StreamState.ANSWERING:
                self._first_token(now)
        elif self._finder is not None:
            self._finder.push(data)
        else:
            self._body += data
            if len(self._body) > MAX_BUFFERED:
                self._finder = UsageFinder()
                self._finder.push(self._body)
                self._body = b""

    def _first_token(self, now: float) -> None:
        self._ticket.first_token(now)
        metrics = self.following.metrics
        ttft, predicted = now - self.arrived, self.decision.predicted_ttft
        metrics.ttft[self.decision.cache_use].observe(ttft)
        metrics.predicted_ttft.observe(predicted)
        if predicted > 0.0:
            metrics.ttft_ratio.observe(ttft / predicted)

    def complete(self) -> None:
        """The answer is whole."""
        if self.state is not DispatchState.ANSWERING:
            return
        following, now = self.following, self.following.clock()
        if following.full and self._status == 200:
            usage, alone = self._usage()
            if self.admitted is not None:
                self.admitted.usage = usage
            count_cached(following.metrics, self.decision, self._ticket, usage, following.fleet.config.block_size, now)
            if usage is not None and alone and self.route.reported is None:
                self._ticket.finished(now, usage)
            if self.route.prompted:
                following.metrics.request_seconds.observe(now - self.arrived)
        self._release(reused=True)

    def _usage(self) -> tuple[Usage | None, bool]:
        """What the answer says of its tokens, and whether it is one of a single sequence."""
        if self._stream is not None:
            return self._stream.usage, self._stream.state is StreamState.ANSWERING
        if self._finder is not None:
            return self._finder.usage, False
        answer = read_answer(self._body) if self._body else WholeAnswer()
        return answer.usage, answer.choices == 1

    def lost(self) -> None:
        """The gateway's stream is over. Does nothing if the request is."""
        if self._advance(DispatchEvent.LOST):
            chosen = next((each for each in self.decision.candidates if each.url == self.decision.url), None)
            decode = chosen.decode_seconds if chosen is not None else 0.0
            ends = self.sent + self.decision.predicted_ttft + decode
            self.following.unobserved.add(self.decision.url, self._ticket, self.sent, ends)
            self._settle()

    def _release(self, *, reused: bool) -> None:
        if self._advance(DispatchEvent.OVER):
            self._ticket.release(self.following.clock(), reused=reused)
            self.following.released(Ended.RESPONSE)
            self._settle()

    def _settle(self) -> None:
        """The key has paid for what is known of the request."""
        if self.admitted is not None:
            self.admitted.settle(self._status, self.following.clock())
