"""Requests that the router sent, and whose end it does not see: when they are over, by the reports of the engines.

A gateway that asks only where a request goes does not say when it ends. The engine's report does, without naming it: it
counts the requests there. If it counts fewer than were sent long enough before it, the rest are over. Which they are is
not known, and makes little difference to the load: those are released whose predicted end came first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from enum import StrEnum
from itertools import count
from typing import NamedTuple

from router.core.ticket import Ticket

ARRIVAL = 0.15
"""Seconds after its dispatch by which a report counts a request: the gateway's way to the engine, and the report's.

As long as a request is taken for running after its end, its worker seems busier than it is, and others get what it has
cached. One that is released because it was still on its way shows in the next report as foreign work."""


class Ended(StrEnum):
    """Why a ticket was released."""

    REPORT = "report"
    """The engine's report counts fewer requests."""
    PREDICTED = "predicted"
    """The engine reports nothing: its predicted end has come."""
    BOUND = "bound"
    """The engine still counts it after the longest time that a ticket is held."""
    RESPONSE = "response"
    """The gateway passed on the end, or the whole, of the answer."""


class Reported(NamedTuple):
    """The last report of a worker, and what the router knows beside it."""

    requests: int
    """Requests in the engine."""
    age: float
    """Seconds since the report came."""
    in_flight: int
    """Requests of this router there, unobserved ones included. The others are among those in the engine, but for the
    few that are on their way; if too many are released because of these, the next report shows them as foreign work."""


class Unobserved:
    """The open tickets of such requests, by worker. O(log n) to add one, O(1) to look at a worker that has none over.

    `report(url, now)` gives the worker's last report; None: it reports nothing.
    """

    def __init__(self, report: Callable[[str, float], Reported | None], bound: float) -> None:
        """`bound`: seconds after which a ticket is released in any case."""
        self._report = report
        self._bound = bound
        self._turn = count()
        self._workers: dict[str, list[tuple[float, int, float, Ticket]]] = {}
        """By URL a heap of predicted end, order, dispatch and ticket."""

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._workers.values())

    def add(self, url: str, ticket: Ticket, sent: float, ends: float) -> None:
        """A request was sent to the worker at `sent` and is expected to end at `ends`."""
        heapq.heappush(self._workers.setdefault(url, []), (ends, next(self._turn), sent, ticket))

    def sweep(self, now: float) -> dict[Ended, int]:
        """Release what is over by now. Returns how many tickets were, and why. O(open tickets)."""
        over: dict[Ended, int] = {}
        for url, heap in list(self._workers.items()):
            for why, tickets in self._over(url, heap, now).items():
                for ticket in tickets:
                    ticket.release(now)
                over[why] = over.get(why, 0) + len(tickets)
            if not heap:
                del self._workers[url]
        return over

    def close(self, now: float) -> None:
        """Nobody looks any more: release them all."""
        for heap in self._workers.values():
            for *_, ticket in heap:
                ticket.release(now)
        self._workers.clear()

    def _over(self, url: str, heap: list[tuple[float, int, float, Ticket]], now: float) -> dict[Ended, list[Ticket]]:
        """Take out of the heap what is over."""
        late = [entry for entry in heap if now - entry[2] >= self._bound]
        if late:
            heap[:] = [entry for entry in heap if now - entry[2] < self._bound]
            heapq.heapify(heap)
        over = {Ended.BOUND: [entry[3] for entry in late]} if late else {}
        reported = self._report(url, now)
        if reported is None:
            ended = []
            while heap and heap[0][0] <= now:
                ended.append(heapq.heappop(heap)[3])
            if ended:
                over[Ended.PREDICTED] = ended
            return over
        counted = [entry for entry in heap if entry[2] + ARRIVAL <= now - reported.age]
        seen = max(reported.in_flight - len(heap), 0)
        gone = len(counted) - max(reported.requests - seen, 0)
        if gone > 0:
            first = heapq.nsmallest(gone, counted)
            taken = {entry[1] for entry in first}
            heap[:] = [entry for entry in heap if entry[1] not in taken]
            heapq.heapify(heap)
            over[Ended.REPORT] = [entry[3] for entry in first]
        return over
