"""Flow control on the event loop: where a request waits for its turn before a worker is chosen for it.

Both data planes use it in the same way, with no `await` between the decision and its dispatch:

    decision = fleet.choose(route, now)
    if admission is not None and admission.must_wait(decision, route, now):
        decision = await admission.turn(route, size)  # raises `Shed`
    with fleet.dispatching(decision, route, clock):
        ...

As long as nothing waits and the chosen worker has room this is two comparisons.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection

from router.core.decision import Decision, RouteRequest
from router.core.fleet import Fleet
from router.core.flow import (
    EARLIEST,
    OVERHEAD,
    FlowControl,
    FlowPolicy,
    Place,
    Restriction,
    ShedReason,
    Waiting,
    WaitState,
)
from router.core.placement import NOWHERE, Placement
from router.metrics import Metrics

SHED_HEADER = b"x-llm-d-request-dropped-reason"
"""Says why a request was turned away, by the values of `ShedReason`."""
LONGEST_RETRY_AFTER = 30.0
SHUT_RETRY_AFTER = 1.0
"""Where a router ends there is another one, or will soon be."""


class Shed(Exception):
    """The request is turned away. `retry_after` is in seconds."""

    def __init__(self, reason: ShedReason, waited: float, retry_after: float, *, held: bool = False) -> None:
        super().__init__((_HELD_MESSAGES if held else _MESSAGES)[reason].format(waited=waited))
        self.reason = reason
        self.retry_after = retry_after
        self.held = held
        """Whether it waited for a worker to become ready."""

    @property
    def status(self) -> int:
        """That of the answer."""
        return 503 if self.held or self.reason is ShedReason.SHUTTING_DOWN else 429


_MESSAGES = {
    ShedReason.SATURATED: "All workers are busy, and there is no room to wait for one. Try again later.",
    ShedReason.EXPIRED: "All workers were busy for {waited:.0f} s, which is as long as this request may wait. Try again"
    " later.",
    ShedReason.SHUTTING_DOWN: "This router is shutting down. Try again.",
}
_HELD_MESSAGES = {
    **_MESSAGES,
    ShedReason.SATURATED: "No worker is ready, and there is no room to wait for one. Try again later.",
    ShedReason.EXPIRED: "No worker became ready within {waited:.0f} s. Try again later.",
}


class Admission:
    """The requests of one router that wait. Looks for room when something has changed that may have made some, or when
    the time will have: nothing is polled."""

    def __init__(self, fleet: Fleet, policy: FlowPolicy, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.flow = FlowControl(policy)
        self._fleet = fleet
        self._placement = Placement(fleet, policy.queue_limit)
        self._metrics = metrics
        self._clock = clock
        self._placing: Waiting | None = None
        """It was placed, and is yet to be dispatched: until then the ledger does not show what room is left."""
        self._look: asyncio.Handle | None = None
        """The next look for room, at once."""
        self._timer: asyncio.TimerHandle | None = None
        """The next look because of the time."""
        self._closed = False
        fleet.on_room(self._wake)

    def must_wait(self, decision: Decision, route: RouteRequest, now: float, barred: Collection[str] = NOWHERE) -> bool:
        """Whether the request has to take its turn, instead of going where this decision says. It must not go to the
        workers that are `barred`."""
        if self.flow.waiting:
            return route.prompted
        if decision.queue_seconds <= self.flow.policy.queue_limit:
            return False
        return route.prompted and self._placement.saturated(decision, route, now, barred)

    def must_hold(self, route: RouteRequest) -> bool:
        """Whether a request for which no worker is ready takes its turn, instead of failing. One about a stored
        response does not: no new worker has that."""
        return self.flow.policy.hold > 0 and route.stored is None and self._placement.absent()

    async def turn(self, route: RouteRequest, size: int, restriction: Restriction | None = None) -> Decision:
        """Wait until the request, whose body has `size` bytes, is placed. Returns where it goes; it must be dispatched
        there before anything is awaited. `restriction`: where it must not go. Raises `Shed`, or as `Fleet.choose`
        does."""
        arrived = self._clock()
        if self._closed:
            raise Shed(ShedReason.SHUTTING_DOWN, 0.0, SHUT_RETRY_AFTER)
        ended: asyncio.Future[ShedReason | None] = asyncio.get_running_loop().create_future()

        def on_end(reason: ShedReason | None) -> None:
            if not ended.done():
                ended.set_result(reason)

        state = WaitState.HELD if self.must_hold(route) else WaitState.WAITING
        waiting = Waiting(route, size + OVERHEAD, arrived, on_end, restriction, state=state)
        self.flow.put(waiting)
        self._wake()
        name = waiting.queue.policy.name
        try:
            reason = await ended
        except asyncio.CancelledError:
            self._metrics.flow_left.labels(name).inc()
            raise
        finally:
            self.flow.remove(waiting)
            if self._placing is waiting:
                self._placing = None
                self._wake()  # after the caller has dispatched it
        now = self._clock()
        if reason is not None:
            self._metrics.flow_shed.labels(name, reason.value).inc()
            after = SHUT_RETRY_AFTER if reason is ShedReason.SHUTTING_DOWN else self.retry_after(waiting, now)
            raise Shed(reason, now - arrived, after, held=state is WaitState.HELD and self._placement.absent())
        self._metrics.flow_wait.labels(name).observe(now - arrived)
        return self._fleet.choose(route, now, waiting.exclude)

    def retry_after(self, waiting: Waiting, now: float) -> float:
        """Seconds after which it may be worth trying again: for as long as the oldest of its class has waited."""
        oldest = waiting.queue.oldest
        waited = now - (oldest.arrived if oldest is not None else waiting.arrived)
        return min(max(waited, 1.0), LONGEST_RETRY_AFTER)

    def close(self) -> None:
        """The router ends: turn away whatever waits, and whatever would have to from now on."""
        self._closed = True
        self.flow.close()
        if self._look is not None:
            self._look.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        """There may be room: look for it, once whatever is under way is done."""
        if self._look is None and self.flow.waiting and self._placing is None:
            self._look = asyncio.get_running_loop().call_soon(self._find_room)

    def _find_room(self) -> None:
        self._look = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        self.flow.expire(now, self._placement.absent)

        def place(waiting: Waiting, anywhere: bool) -> Place:
            return self._placement.place(waiting, anywhere, now)

        placed = self.flow.next(now, place)
        if placed is not None and placed.state is WaitState.PLACED:
            self._placing = placed
        elif self.flow.waiting:
            self._sleep(now)

    def _sleep(self, now: float) -> None:
        """Look again when the ledger will show room by itself, or a time-out is over."""
        when = min(max(self.flow.room_at, now + EARLIEST), self.flow.wake_at(now))
        if when < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(when - now, 0.0), self._find_room)
