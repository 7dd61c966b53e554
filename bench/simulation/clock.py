"""Virtual time: a heap of what happens next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

Happening = Callable[[float], None]
"""Something that happens at a moment, which it is told, in seconds since the start."""


class VirtualClock:
    """Lets things happen in the order of their times, and those of one moment in the order in which they were asked
    for. O(log pending) each; O(1) for most of those that are asked for by `soon`."""

    __slots__ = ("_heap", "_lane", "_order", "now")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Happening]] = []
        self._lane: deque[tuple[float, int, Happening]] = deque()
        """Those asked for in the order in which they happen: beside the heap, because they need none."""
        self._order = count()
        self.now = 0.0
        """The moment that happens."""

    def at(self, when: float, happen: Happening) -> None:
        """Let `happen(when)` happen then. `when` must not lie before the moment that happens now."""
        heappush(self._heap, (when, next(self._order), happen))

    def soon(self, when: float, happen: Happening) -> None:
        """The same, for what happens after a short delay that is mostly the same."""
        lane = self._lane
        if lane and when < lane[-1][0]:
            heappush(self._heap, (when, next(self._order), happen))
        else:
            lane.append((when, next(self._order), happen))

    def play(self) -> None:
        """Let everything happen, until nothing is left."""
        heap, lane = self._heap, self._lane
        while True:
            if lane and (not heap or lane[0] < heap[0]):
                now, _, happen = lane.popleft()
            elif heap:
                now, _, happen = heappop(heap)
            else:
                return
            self.now = now
            happen(now)
