"""This router's own requests on one worker, from dispatch to release.

What a worker reports is always a little late; what the router itself sent is known at once. So the ledger, not the
report, is the first source of the queue estimate: a burst of requests in one millisecond sees itself.
"""

from __future__ import annotations

import math


class Entry:
    """One request on one worker. Only its ledger changes it."""

    __slots__ = ("blocks", "due", "open", "pending", "seconds", "streaming")

    def __init__(self, seconds: float, blocks: int, streaming: bool, due: float) -> None:
        self.seconds = seconds
        """Predicted prefill."""
        self.blocks = blocks
        """Blocks it will take beyond those it shares."""
        self.streaming = streaming
        self.due = due
        """When it is late, if it does not stream."""
        self.open = True
        self.pending = True
        """Its first token is not out yet, as far as can be known."""


class Ledger:
    """Exact counts of what is open, and how much predicted prefill has not been answered yet.

    Every operation is O(1) (amortised for `remaining`), and closing an entry twice does nothing, so no count can
    leak or go below zero.
    """

    __slots__ = ("_exact", "_head_start", "_pending", "_seconds", "_step", "_whole", "blocks", "in_flight")

    def __init__(self, step: float = math.inf) -> None:
        """`step`: longest time that one engine step takes; requests that share a step are answered at its end."""
        self._step = step
        self._pending: dict[Entry, None] = {}  # in order of dispatch
        self._whole: dict[Entry, None] = {}  # those that do not stream, in order of dispatch
        self._seconds = 0.0
        self._head_start = 0.0
        self._exact = False
        """Whether the head's prefill is known to have begun then."""
        self.in_flight = 0
        self.blocks = 0

    @property
    def unseen(self) -> bool:
        """Whether there are requests whose progress does not show."""
        return bool(self._whole)

    def late(self, now: float) -> float:
        """Seconds by which the longest-running request that does not stream is late: the engine is slower than
        expected, or stalled."""
        return max(0.0, now - next(iter(self._whole)).due) if self._whole else 0.0

    @property
    def waiting(self) -> bool:
        """Whether a request's first token is not out yet, as of the last `remaining`."""
        return bool(self._pending)

    @property
    def decoding(self) -> bool:
        """Whether a request is past its first token, as of the last `remaining`."""
        return self.in_flight > len(self._pending)

    def open(self, seconds: float, blocks: int, streaming: bool, now: float, due: float = math.inf) -> Entry:
        """One request more, expected to prefill for `seconds` once it is its turn, and late if it is not over by `due`
        (of one that does not stream nothing is seen before)."""
        self.remaining(now)  # what is over by now must not be charged to the newcomer's start
        entry = Entry(seconds, blocks, streaming, due)
        if not streaming:
            self._whole[entry] = None
        if not self._pending:
            self._head_start = now
            self._exact = True
        self._pending[entry] = None
        self._seconds += seconds
        self.in_flight += 1
        self.blocks += blocks
        return entry

    def first_token(self, entry: Entry, now: float) -> float | None:
        """The request's prefill is over, so the next one's has begun. When its own began, if that is known."""
        if not entry.pending:
            return None
        in_turn = next(iter(self._pending)) is entry
        began = self._head_start if in_turn and self._exact else None
        self._answered(entry, now)
        self._exact = in_turn
        return began

    def close(self, entry: Entry, now: float) -> None:
        """The request is gone, however it ended. Idempotent."""
        if not entry.open:
            return
        entry.open = False
        self._whole.pop(entry, None)
        self.in_flight -= 1
        self.blocks -= entry.blocks
        if entry.pending:
            head = next(iter(self._pending)) is entry
            self._answered(entry, now if head else self._head_start)
            self._exact = False

    def remaining(self, now: float) -> float:
        """Seconds of predicted prefill still ahead of a newcomer.

        The unanswered requests' predictions minus the time since the head of them started, in which no more can have
        been done than the head's own and a step that it shares. When the head, or even the whole sum, is overdue,
        something holds the worker up, and what is late by x is expected to need another x: a worker that stalls looks
        worse with time, not better.

        A request that does not stream never shows its first token: it counts as answered when its time is over.
        """
        pending = self._pending
        while pending:
            head = next(iter(pending))
            due = self._head_start + head.seconds
            if head.streaming or due > now:
                elapsed = now - self._head_start
                progress = min(elapsed, self._seconds, head.seconds + self._step)
                return self._seconds - progress + (elapsed - progress)
            self._answered(head, due)
            self._exact = False
        return 0.0

    def _answered(self, entry: Entry, at: float) -> None:
        entry.pending = False
        del self._pending[entry]
        self._head_start = at
        # An empty queue is exactly 0, so rounding never adds up.
        self._seconds = max(0.0, self._seconds - entry.seconds) if self._pending else 0.0
