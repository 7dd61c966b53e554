"""Flow control of a simulated router: the product's own rules (`router.core.flow`), on virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from bench.simulation.clock import VirtualClock
from router.core.decision import BYTES_OF_A_TOKEN, Decision, RouteRequest
from router.core.fleet import Fleet
from router.core.flow import EARLIEST, OVERHEAD, FlowControl, FlowPolicy, ShedReason, Waiting
from router.core.placement import Placement

OnEnd = Callable[[ShedReason | None, frozenset[str]], None]


class SimulatedAdmission:
    """The requests of one router that wait (`router.server.admission.Admission`)."""

    def __init__(self, clock: VirtualClock, fleet: Fleet, policy: FlowPolicy) -> None:
        self.flow = FlowControl(policy)
        self._clock = clock
        self._placement = Placement(fleet, policy.queue_limit)
        self._look = 0
        """Number of the next look for room: earlier ones are ignored."""
        self._at = math.inf
        """When it is."""
        fleet.on_room(self._wake)

    def must_wait(self, decision: Decision, route: RouteRequest, now: float) -> bool:
        """Whether a request has to take its turn."""
        return self.flow.waiting > 0 or self._placement.saturated(decision, route, now)

    def put(self, route: RouteRequest, now: float, on_end: OnEnd) -> None:
        """A request waits. `on_end` is called when it no longer does: with why it was shed, or with the workers that it
        does not go to; then it must be dispatched within the call."""
        size = (route.prompt_tokens or 0) * BYTES_OF_A_TOKEN + OVERHEAD
        waiting = Waiting(route, size, now, lambda reason: on_end(reason, waiting.exclude))
        self.flow.put(waiting)
        self._wake()

    def _wake(self) -> None:
        if self.flow.waiting:
            self._look_at(self._clock.now)

    def _look_at(self, when: float) -> None:
        if when < self._at:
            self._look += 1
            self._at = when
            self._clock.at(when, partial(self._find_room, self._look))

    def _find_room(self, look: int, now: float) -> None:
        if look != self._look:
            return
        self._at = math.inf
        self.flow.expire(now, self._placement.absent)
        while self.flow.next(now, lambda waiting, anywhere: self._placement.place(waiting, anywhere, now)) is not None:
            pass
        self._look_at(min(max(self.flow.room_at, now + EARLIEST), self.flow.wake_at(now)))
