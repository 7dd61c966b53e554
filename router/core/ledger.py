"""This router's own requests on one worker, from dispatch to release.

A worker's report is always a little late; what the router itself sent is known at once. So the queue estimate relies on
the ledger first: each request of a burst within one millisecond takes the ones before it into account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum, auto

from router.core.standing import NEVER


class EntryState(StrEnum):
    """How far a request is, as far as can be known. (A `StrEnum`, because its members hash in C.)"""

    PREFILLING = auto()
    """It is queued or prefilling: its first token has not come yet."""
    DECODING = auto()
    """Its first token has come or, if it does not stream, its predicted time to the first token is over."""
    ENDED = auto()


class EntryEvent(StrEnum):
    """What happens to a request."""

    FIRST_TOKEN = auto()
    RELEASED = auto()


ENTRY_TRANSITIONS: Mapping[tuple[EntryState, EntryEvent], EntryState] = {
    (EntryState.PREFILLING, EntryEvent.FIRST_TOKEN): EntryState.DECODING,
    (EntryState.PREFILLING, EntryEvent.RELEASED): EntryState.ENDED,
    (EntryState.DECODING, EntryEvent.RELEASED): EntryState.ENDED,
}
PREFILLING, ENDED = EntryState.PREFILLING, EntryState.ENDED  # looking a member up in its enum takes longer
_FIRST_TOKEN, _RELEASED = EntryEvent.FIRST_TOKEN, EntryEvent.RELEASED


class Entry:
    """One request on one worker. Only its ledger changes it."""

    __slots__ = ("blocks", "context", "due", "output", "seconds", "state", "streaming", "token_share")

    def __init__(self, seconds: float, blocks: int, streaming: bool, due: float, context: int, output: float) -> None:
        self.seconds = seconds
        """Predicted prefill."""
        self.blocks = blocks
        """Blocks that it takes in addition to those it reuses."""
        self.streaming = streaming
        self.due = due
        """When a request that does not stream counts as late."""
        self.context = context
        """Tokens whose keys and values each of its decode steps reads, on average."""
        self.output = output
        """Expected tokens of its answer."""
        self.token_share = 1.0 / output if output > 1.0 else 0.0
        """What one of them is of the whole; 0 if no token comes after the first."""
        self.state = PREFILLING


class Ledger:
    """Exact counts of the open requests, and how much of their predicted prefill is not answered yet.

    Every operation is O(1) (amortised for `remaining`). Closing an entry twice does nothing, so no count can leak or go
    below zero.
    """

    __slots__ = (
        "_exact", "_head_start", "_loading", "_non_streaming", "_pending", "_seconds", "_step", "blocks", "context",
        "in_flight", "output", "reserved", "token_share",
    )  # fmt: skip

    def __init__(self, step: float = math.inf) -> None:
        """`step`: the longest time of one engine step; requests that share a step are answered at its end."""
        self._step = step
        self._pending: dict[Entry, None] = {}  # in order of dispatch
        self._loading: dict[Entry, float] = {}
        """Requests that wait for blocks from a slower tier, and until when: the engine computes others meanwhile."""
        self._non_streaming: dict[Entry, None] = {}  # in order of dispatch
        self._seconds = 0.0
        self._head_start = 0.0
        self._exact = False
        """Whether the prefill of the first pending request is known to have begun at `_head_start`."""
        self.in_flight = 0
        self.blocks = 0
        self.context = 0
        """Tokens of context of the requests that decode."""
        self.reserved = 0
        """Tokens of context of all requests, those that will decode included."""
        self.output = 0.0
        """Expected tokens of all their answers."""
        self.token_share = 0.0
        """Sum of what one token is of each of them."""

    @property
    def has_non_streaming(self) -> bool:
        """Whether there are requests whose progress cannot be observed."""
        return bool(self._non_streaming)

    @property
    def plain(self) -> bool:
        """Whether all requests stream and none waits for a load: nothing changes by the time alone."""
        return not (self._non_streaming or self._loading)

    def late(self, now: float) -> float:
        """Seconds by which the oldest request that does not stream is late: the engine is slower than expected, or
        stalled."""
        return max(0.0, now - next(iter(self._non_streaming)).due) if self._non_streaming else 0.0

    @property
    def waiting(self) -> bool:
        """Whether the first token of a request has not come yet, as of the last `remaining`."""
        return bool(self._pending or self._loading)

    @property
    def decoding(self) -> int:
        """Requests that are past their first token, as of the last `remaining`."""
        return self.in_flight - len(self._pending) - len(self._loading)

    def open(
        self,
        seconds: float,
        blocks: int,
        streaming: bool,
        now: float,
        due: float = math.inf,
        context: int = 0,
        load: float = 0.0,
        output: float = 0.0,
    ) -> Entry:
        """Add a request that is expected to prefill for `seconds` when its turn comes, after a `load` that lets others
        go before it. One that does not stream, and so shows nothing before its end, is late if it is not over by
        `due`."""
        self.remaining(now)  # prefills that are over by now must not delay the start of this one
        entry = Entry(seconds, blocks, streaming, due, context, output)
        if not streaming:
            self._non_streaming[entry] = None
        if load:
            self._loading[entry] = now + self._seconds + load
        else:
            self._wait(entry, now)
        self.in_flight += 1
        self.blocks += blocks
        self.reserved += context
        self.output += output
        self.token_share += entry.token_share
        return entry

    def first_token(self, entry: Entry, now: float) -> float | None:
        """The prefill of the request is over, so that of the next one has begun. Returns when its own began; None: not
        known."""
        if entry.state is not PREFILLING:
            return None
        if entry in self._loading:
            self._end_load(entry, _FIRST_TOKEN)
            return None
        in_turn = next(iter(self._pending)) is entry
        began = self._head_start if in_turn and self._exact else None
        self._end_prefill(entry, now, _FIRST_TOKEN)
        self._exact = in_turn
        return began

    def close(self, entry: Entry, now: float) -> None:
        """The request is over, however it ended. Idempotent."""
        if entry.state is ENDED:
            return
        self._non_streaming.pop(entry, None)
        self.in_flight -= 1
        self.blocks -= entry.blocks
        self.reserved -= entry.context
        self.output = self.output - entry.output if self.in_flight else 0.0  # rounding errors never accumulate
        self.token_share = self.token_share - entry.token_share if self.in_flight else 0.0
        if entry in self._loading:
            self._end_load(entry, _RELEASED)
        elif entry.state is PREFILLING:
            head = next(iter(self._pending)) is entry
            self._end_prefill(entry, now if head else self._head_start, _RELEASED)
            self._exact = False
        else:
            entry.state = ENTRY_TRANSITIONS[entry.state, _RELEASED]
            self.context -= entry.context

    def remaining(self, now: float) -> float:
        """Seconds of predicted prefill that a new request has to wait for.

        These are the predictions of the unanswered requests, minus the time since the first of them started; in that
        time the worker can have done no more than the first one's own prefill and one step that it shares. When the
        first request, or even the whole sum, is overdue, something delays the worker, and what is late by x is expected
        to need another x: a worker that stalls looks worse with time, not better.

        A request that does not stream never shows its first token: it counts as answered when its predicted time is
        over.
        """
        pending = self._pending
        if self._loading:
            self._take_loaded(now)
        while pending:
            head = next(iter(pending))
            due = self._head_start + head.seconds
            if head.streaming or due > now:
                elapsed = now - self._head_start
                progress = min(elapsed, self._seconds, head.seconds + self._step)
                return self._seconds - progress + (elapsed - progress)
            self._end_prefill(head, due, _FIRST_TOKEN)
            self._exact = False
        return 0.0

    def waiting_at(self, now: float) -> tuple[float, float, float, float, float]:
        """What `remaining` says from now on, as long as no request is opened, answered or closed: the first fields of
        a `Standing`."""
        self.remaining(now)
        until = min(self._loading.values(), default=NEVER) if self._loading else NEVER
        if not self._pending:
            return until, 0.0, 0.0, 0.0, 0.0
        head = next(iter(self._pending))
        if not head.streaming:
            until = min(until, self._head_start + head.seconds)
        return until, 1.0, self._seconds, self._head_start, min(self._seconds, head.seconds + self._step)

    @property
    def late_from(self) -> float:
        """When the oldest request that does not stream is late."""
        return next(iter(self._non_streaming)).due if self._non_streaming else NEVER

    def _wait(self, entry: Entry, at: float) -> None:
        """From `at` on the request waits for its prefill."""
        if not self._pending:
            self._head_start = at
            self._exact = True
        self._pending[entry] = None
        self._seconds += entry.seconds

    def _take_loaded(self, now: float) -> None:
        """Requests whose loads have ended wait for their prefill from then on."""
        for entry, ends in tuple(self._loading.items()):
            if ends <= now:
                del self._loading[entry]
                self._wait(entry, ends)
                self._exact = False

    def _end_load(self, entry: Entry, event: EntryEvent) -> None:
        """The request is answered, or over, before its load was expected to have ended."""
        del self._loading[entry]
        entry.state = ENTRY_TRANSITIONS[entry.state, event]
        if event is _FIRST_TOKEN:
            self.context += entry.context

    def _end_prefill(self, entry: Entry, at: float, event: EntryEvent) -> None:
        entry.state = ENTRY_TRANSITIONS[entry.state, event]
        if event is _FIRST_TOKEN:
            self.context += entry.context
        del self._pending[entry]
        self._head_start = at
        # An empty queue is exactly 0, so rounding errors never accumulate.
        self._seconds = max(0.0, self._seconds - entry.seconds) if self._pending else 0.0
