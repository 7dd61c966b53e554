"""Whether a request finds room on a worker now: the ledger's answer, which flow control asks for."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from router.core.decision import BYTES_OF_A_TOKEN, Decision, NoWorkerReady, RouteRequest
from router.core.fleet import Fleet
from router.core.flow import Place, Verdict, Waiting
from router.core.stored_responses import HolderGone

NOWHERE: frozenset[str] = frozenset()


class Placement:
    """Looks for places in one fleet. A worker has room while a new request would wait there for at most `limit`
    seconds, by the ledger: for prefills and for memory."""

    def __init__(self, fleet: Fleet, limit: float) -> None:
        self._fleet = fleet
        self._limit = limit

    def saturated(self, decision: Decision, route: RouteRequest, now: float, barred: Collection[str] = NOWHERE) -> bool:
        """Whether no worker that can take the request has room; `decision` is where it would go, `barred` where it must
        not. O(1) if that one has room, else O(workers)."""
        return decision.queue_seconds > self._limit and self._room(route, now, barred).none

    def place(self, waiting: Waiting, anywhere: bool, now: float) -> Place:
        """See `FlowControl.next`. Where the request is placed, it has to be dispatched before the next one is."""
        route = waiting.route
        barred = waiting.restriction.barred() if waiting.restriction is not None else NOWHERE
        try:
            room = self._room(route, now, barred)
            if room.none:
                return Place(Verdict.FULL, room_in=min(room.full.values())) if room.full else Place(Verdict.FULL)
            waiting.exclude = barred | room.full.keys() if anywhere else barred
            decision = self._fleet.choose(route, now, waiting.exclude)
        except HolderGone:
            return Place(Verdict.PLACED)  # the answer is an error, which has not to wait
        except NoWorkerReady:
            return Place(Verdict.FULL)
        if decision.url in room.full:
            return Place(Verdict.PREFERS_FULL, room_in=room.full[decision.url])
        return Place(Verdict.PLACED, uncached_tokens(decision, route, waiting.size, self._fleet.config.block_size))

    def absent(self) -> bool:
        """Whether no worker is ready, for any request."""
        return not self._fleet.any_ready

    def _room(self, route: RouteRequest, now: float, barred: Collection[str]) -> _Room:
        waits = self._fleet.waits(route, now)
        if barred:
            waits = {url: wait for url, wait in waits.items() if url not in barred}
        full = {url: wait - self._limit for url, wait in waits.items() if wait > self._limit}
        return _Room(full, len(full) == len(waits))


class _Room(NamedTuple):
    full: dict[str, float]
    """The workers that have none, by URL, and in how many seconds each is expected to."""
    none: bool


def uncached_tokens(decision: Decision, route: RouteRequest, size: int, block_size: int) -> int:
    """Tokens that the worker with the longest match would have to compute: what a tenant is charged, so that nobody
    pays for being sent elsewhere. Of a prompt that was not read the size of its body says how long it is."""
    if route.prompt_tokens is None:
        return max(size // BYTES_OF_A_TOKEN, 1)
    return max(route.prompt_tokens - decision.best_blocks * block_size, 1)
