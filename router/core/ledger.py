"""This router's own requests on one worker, from dispatch to release.

What a worker reports is always a little late; what the router itself sent is known at once. So the ledger, not the
report, is the first source of the queue estimate: a burst of requests in one millisecond sees itself.
"""

from __future__ import annotations


class Entry:
    """One request on one worker. Only its ledger changes it."""

    __slots__ = ("blocks", "open", "pending", "seconds", "streaming")

    def __init__(self, seconds: float, blocks: int, streaming: bool) -> None:
        self.seconds = seconds
        """Predicted prefill."""
        self.blocks = blocks
        """Blocks it will take beyond those it shares."""
        self.streaming = streaming
        self.open = True
        self.pending = True
        """Its first token is not out yet, as far as can be known."""


class Ledger:
    """Exact counts of what is open, and how much predicted prefill has not been answered yet.

    Every operation is O(1) (amortised for `remaining`), and closing an entry twice does nothing, so no count can
    leak or go below zero.
    """

    __slots__ = ("_head_start", "_pending", "_seconds", "blocks", "in_flight", "last")

    def __init__(self) -> None:
        self._pending: dict[Entry, None] = {}  # in order of dispatch
        self._seconds = 0.0
        self._head_start = 0.0
        self.in_flight = 0
        self.blocks = 0
        self.last: Entry | None = None
        """The newest, however it ended."""

    @property
    def decoding(self) -> bool:
        """Whether a request is past its first token, as of the last `remaining`."""
        return self.in_flight > len(self._pending)

    def open(self, seconds: float, blocks: int, streaming: bool, now: float) -> Entry:
        """One request more, expected to prefill for `seconds` once it is its turn."""
        self.remaining(now)  # what is over by now must not be charged to the newcomer's start
        entry = Entry(seconds, blocks, streaming)
        if not self._pending:
            self._head_start = now
        self._pending[entry] = None
        self._seconds += seconds
        self.in_flight += 1
        self.blocks += blocks
        self.last = entry
        return entry

    def first_token(self, entry: Entry, now: float) -> None:
        """The request's prefill is over, so the next one's has begun."""
        if entry.pending:
            self._answered(entry, now)

    def close(self, entry: Entry, now: float) -> None:
        """The request is gone, however it ended. Idempotent."""
        if not entry.open:
            return
        entry.open = False
        self.in_flight -= 1
        self.blocks -= entry.blocks
        if entry.pending:
            head = next(iter(self._pending)) is entry
            self._answered(entry, now if head else self._head_start)

    def remaining(self, now: float) -> float:
        """Seconds of predicted prefill still ahead of a newcomer.

        The unanswered requests' predictions minus the time since the head of them started. When even the whole
        sum is overdue, something holds the worker up, and what is late by x is expected to need another x: a
        worker that stalls looks worse with time, not better.

        A request that does not stream never shows its first token: it counts as answered when its time is over.
        """
        pending = self._pending
        while pending:
            head = next(iter(pending))
            due = self._head_start + head.seconds
            if head.streaming or due > now:
                return abs(self._seconds - (now - self._head_start))
            self._answered(head, due)
        return 0.0

    def _answered(self, entry: Entry, at: float) -> None:
        entry.pending = False
        del self._pending[entry]
        self._head_start = at
        # An empty queue is exactly 0, so rounding never adds up.
        self._seconds = max(0.0, self._seconds - entry.seconds) if self._pending else 0.0
