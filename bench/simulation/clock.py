"""Virtual time: a heap of what happens next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

Happening = Callable[[float], None]
"""Something that happens at a moment, which it is told, in seconds since the start."""


class VirtualClock:
    """Lets things happen in the order of their times, and those of one moment in the order in which they were asked
    for. O(log pending) each."""

    __slots__ = ("_heap", "_order", "now")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Happening]] = []
        self._order = count()
        self.now = 0.0
        """The moment that happens."""

    def at(self, when: float, happen: Happening) -> None:
        """Let `happen(when)` happen then. `when` must not lie before the moment that happens now."""
        heappush(self._heap, (when, next(self._order), happen))

    def play(self) -> None:
        """Let everything happen, until nothing is left."""
        heap = self._heap
        while heap:
            now, _, happen = heappop(heap)
            self.now = now
            happen(now)
