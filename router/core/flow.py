"""Flow control: which requests wait in the router while the fleet is saturated, for how long, and who goes next.

An engine serves requests in the order in which it got them, so whatever waits there is out of the router's hands: a
burst of one tenant delays everybody. What waits here is ordered by class (strict priority), within a class fairly among
tenants (`fair_queue`), and within a tenant by arrival. What finds no ready worker at all is held in the same queue,
for as long as one may take to start. Decision 031 has the reasons, docs/flow-control.md the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from router.core.decision import RouteRequest
from router.core.fair_queue import FairQueue, Flow

OVERHEAD = 1024
"""Bytes that a waiting request takes besides its body: its task, its keys, its place in the queue."""
EARLIEST = 0.001
"""Seconds until the next look for room at least, where only the time makes room."""
MAX_TRIES = 16
"""Requests for which a place is looked for before one is given the best worker that has room."""
MAX_FULL = 64
"""Groups of requests that may be found to have no room before the search is put off, to go on behind them: what makes a
group (a model, a rank, a subset) clients choose."""
MAX_CLASSES = 16
"""Each has series of its own in the metrics."""
_CLASS = re.compile(
    r"(?P<name>[a-z][a-z0-9-]{0,30})=(?P<priority>-?[0-9]{1,9})(:(?P<ttl>[0-9]{1,6}(\.[0-9]{1,3})?)(:(?P<mib>[0-9]{1,6}))?)?"
)


@dataclass(frozen=True, slots=True)
class FlowClass:
    """Requests of similar urgency. A request belongs to the class with the largest `priority` that does not exceed its
    own, or to the lowest."""

    name: str
    priority: int
    ttl: float = 30.0
    """Seconds that its requests wait at most."""
    max_bytes: int = 128 * 2**20
    """Bytes that its waiting requests take at most."""


@dataclass(frozen=True, slots=True)
class FlowPolicy:
    """What flow control holds to."""

    classes: tuple[FlowClass, ...] = (FlowClass("high", 1), FlowClass("standard", 0), FlowClass("sheddable", -1))
    """In any order, with different priorities and names."""
    max_bytes: int = 256 * 2**20
    """Bytes that all waiting requests take at most."""
    max_requests: int = 4096
    """Most requests that wait."""
    queue_limit: float = 0.02
    """A worker has room while a new request would wait for at most so many seconds there."""
    quantum: int = 2048
    """Tokens that each tenant may compute in one round: those of one step of an engine."""
    overtaken: float = 1.0
    """Seconds after it was first overtaken by which a request takes any worker that has room."""
    hold: float = 0.0
    """Seconds that a request waits at most for a worker to become ready; 0: such requests do not wait here."""


def parse_class(text: str) -> FlowClass:
    """The class that `NAME=PRIORITY[:TTL[:MIB]]` describes. Raises `ValueError`."""
    found = _CLASS.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r:.200} is no class: write NAME=PRIORITY, NAME=PRIORITY:TTL or NAME=PRIORITY:TTL:MIB, as in "
            "interactive=10:30:128 (a name in lower case, a whole number, seconds, MiB)"
        )
    default = FlowClass(found["name"], int(found["priority"]))
    ttl = float(found["ttl"]) if found["ttl"] else default.ttl
    most = int(found["mib"]) * 2**20 if found["mib"] else default.max_bytes
    if not ttl or not most:
        raise ValueError(f"{text!r:.200}: a class needs time and room to wait; leave it out, or its figures")
    return FlowClass(default.name, default.priority, ttl, most)


def check_classes(classes: Sequence[FlowClass]) -> None:
    """Raises `ValueError` unless there is a class, and all differ by name and by priority."""
    if not classes:
        raise ValueError("at least one class is needed")
    for what, values in (
        ("names", [each.name for each in classes]),
        ("priorities", [each.priority for each in classes]),
    ):
        if len({*values}) < len(classes):
            raise ValueError(f"the classes have {what} in common: {', '.join(map(str, values))}")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"there are more than {MAX_CLASSES} classes")


class ShedReason(StrEnum):
    """Why a request is turned away. Label `reason` of `kvcluster_router_flow_shed_total`; the values are those of
    llm-d's header `x-llm-d-request-dropped-reason`."""

    SATURATED = "rejected-saturated"
    """There was no room to wait, or a more urgent request took it."""
    EXPIRED = "rejected-ttl-expired"
    """It has waited for as long as it may."""
    SHUTTING_DOWN = "rejected-shutting-down"
    """The router ends."""


class WaitState(Enum):
    """Where a request is that had to wait."""

    WAITING = auto()
    """All workers were busy when it came."""
    HELD = auto()
    """No worker was ready when it came, or when it had waited for as long as its class allows."""
    PLACED = auto()
    """It goes to a worker."""
    SHED = auto()
    """It was turned away."""
    LEFT = auto()
    """Its client has gone."""


class WaitEvent(Enum):
    """What happens to a request that waits."""

    NO_WORKER = auto()
    """Its time is over, but there is no worker that might have served it."""
    PLACED = auto()
    SHED = auto()
    LEFT = auto()


WAIT_TRANSITIONS: Mapping[tuple[WaitState, WaitEvent], WaitState] = {
    (WaitState.WAITING, WaitEvent.PLACED): WaitState.PLACED,
    (WaitState.WAITING, WaitEvent.SHED): WaitState.SHED,
    (WaitState.WAITING, WaitEvent.LEFT): WaitState.LEFT,
    (WaitState.WAITING, WaitEvent.NO_WORKER): WaitState.HELD,
    (WaitState.HELD, WaitEvent.PLACED): WaitState.PLACED,
    (WaitState.HELD, WaitEvent.SHED): WaitState.SHED,
    (WaitState.HELD, WaitEvent.LEFT): WaitState.LEFT,
    (WaitState.PLACED, WaitEvent.LEFT): WaitState.LEFT,
}


def wait_transition(state: WaitState, event: WaitEvent) -> WaitState:
    """The state after `event`. An event changes nothing in a state for which no transition is listed."""
    return WAIT_TRANSITIONS.get((state, event), state)


class Restriction(NamedTuple):
    """What bars requests from workers, beside what they ask for."""

    name: Hashable
    """The same for requests that are barred from the same workers."""
    barred: Callable[[], frozenset[str]]
    """Gives the URLs of those workers, of those that there are now."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits. Only its `FlowControl` changes it."""

    route: RouteRequest
    size: int
    """Bytes that it takes."""
    arrived: float
    on_end: Callable[[ShedReason | None], None]
    """Called once when it no longer waits: None, it is placed. Not called when its client left."""
    restriction: Restriction | None = None
    """Where it must not go; None: it may go everywhere."""
    state: WaitState = WaitState.WAITING
    """At first `WAITING` or `HELD`."""
    overtaken_at: float | None = None
    """When a request that came after it, in the order of their turns, was first placed before it."""
    exclude: frozenset[str] = frozenset()
    """Workers that it does not go to: those, and some where it would cost less, but that have no room."""
    queue: ClassQueue = field(init=False)
    flow: Flow[Waiting] = field(init=False)
    since: float = field(init=False)
    """When its present wait began, which is bounded."""

    def __post_init__(self) -> None:
        self.since = self.arrived

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in (WaitState.WAITING, WaitState.HELD)


def group_of(waiting: Waiting) -> Hashable:
    """The same for requests that can go to the same workers: for the same model (and rank), or about responses that
    one worker stores, within the same restriction."""
    route, restriction = waiting.route, waiting.restriction
    allowed = restriction.name if restriction is not None else None
    holder = (route.stored.tag,) if route.stored is not None else None
    return route.model, route.rank, holder, allowed


class Verdict(Enum):
    """Whether a request can be placed now."""

    PLACED = auto()
    FULL = auto()
    """No worker that can take it has room, nor one that can take another request of its group."""
    PREFERS_FULL = auto()
    """There is room, but not on the worker where it costs least."""


class Place(NamedTuple):
    """What looking for a place has found."""

    verdict: Verdict
    tokens: int = 0
    """Tokens that the worker has to compute, if it is placed."""
    room_in: float = math.inf
    """Seconds until there will be room by the passing of time alone, if it is not placed: on any worker, or on the one
    that it prefers. Infinite: only an event makes room."""


class ClassQueue:
    """The waiting requests of one class."""

    def __init__(self, policy: FlowClass, quantum: int, hold: float) -> None:
        self.policy = policy
        self.flows: FairQueue[Waiting] = FairQueue(quantum)
        self.waits: Mapping[WaitState, dict[Waiting, None]] = {WaitState.WAITING: {}, WaitState.HELD: {}}
        """By state, each in the order in which their waits began, which is also that in which they are over."""
        self.limits: Mapping[WaitState, float] = {WaitState.WAITING: policy.ttl, WaitState.HELD: hold}
        """Seconds that a wait may last."""
        self.size = 0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self.waits.values()))

    @property
    def oldest(self) -> Waiting | None:
        """The one that arrived first, but for those that were held only after they had waited; None: none waits."""
        first = (next(iter(each)) for each in self.waits.values() if each)
        return min(first, key=lambda waiting: waiting.arrived, default=None)


class FlowControl:
    """The requests that wait. Time is passed in as `now`, in seconds.

    Every request that is put in is placed, shed or removed exactly once. The bounds of `FlowPolicy` hold at any time.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy = policy
        ordered = sorted(policy.classes, key=lambda each: -each.priority)
        self.classes = tuple(ClassQueue(each, policy.quantum, policy.hold) for each in ordered)
        """The most urgent first."""
        self.size = 0
        self.waiting = 0
        self._overtaken: dict[Waiting, float] = {}
        """Those that have been overtaken, and when they will take any worker: the earliest first."""
        self.room_at = math.inf
        """When there may be room for one of those for which `next` looked for a place last; infinite: time alone makes
        none."""
        self._full: set[Hashable] = set()
        """The groups without room behind which a search that was put off goes on, until it has reached the end or
        placed `MAX_FULL` requests."""
        self._room_before = math.inf
        """When there may be room for one of those groups."""
        self._placed_behind = 0

    def class_of(self, priority: int) -> ClassQueue:
        """The class of a request of this priority."""
        return next((each for each in self.classes if each.policy.priority <= priority), self.classes[-1])

    def put(self, waiting: Waiting) -> None:
        """A request has to wait; if there is no room, it or others are shed, the least urgent first and among equals
        the newest of the tenant that holds most."""
        queue = waiting.queue = self.class_of(waiting.route.caller.priority)
        waiting.flow = queue.flows.push(waiting.route.caller.tenant, group_of(waiting), waiting, waiting.size)
        queue.waits[waiting.state][waiting] = None
        queue.size += waiting.size
        self.size += waiting.size
        self.waiting += 1
        while queue.size > queue.policy.max_bytes and waiting.waits:
            self._shed_newest(queue)
        while self._overfull() and waiting.waits:
            self._shed_newest(next(each for each in reversed(self.classes) if each.size))

    def next(self, now: float, place: Callable[[Waiting, bool], Place]) -> Waiting | None:
        """Place the request whose turn it is; None: none can be placed now.

        `place(waiting, anywhere)` says whether it can go to a worker now: to the one where it costs least, or
        (`anywhere`) to the best of those that have room. It is asked at most `MAX_TRIES` + `MAX_FULL` + 1 times.
        """
        full = set(self._full)
        most = len(full) + MAX_FULL
        passed: list[Waiting] = []
        self.room_at = self._room_before
        for queue in self.classes:
            for flow in queue.flows.order():
                if flow.group in full:
                    continue
                if len(full) >= most:
                    self._full, self._room_before = full, self.room_at
                    self.room_at = now  # at once, when the event loop has done something else
                    return None
                first = flow.first
                anywhere = first.overtaken_at is not None and now - first.overtaken_at >= self.policy.overtaken
                found = place(first, anywhere)
                if found.verdict is Verdict.PLACED:
                    return self._placed(first, found.tokens, passed, now)
                self.room_at = min(self.room_at, now + found.room_in)
                if found.verdict is Verdict.FULL:
                    full.add(flow.group)
                    continue
                passed.append(first)
                if len(passed) >= MAX_TRIES:
                    found = place(passed[0], True)
                    return self._placed(passed[0], found.tokens, [], now) if found.verdict is Verdict.PLACED else None
        self._begin_anew()
        return None

    def _begin_anew(self) -> None:
        """The next search begins with the request whose turn it is."""
        self._full, self._room_before, self._placed_behind = set(), math.inf, 0

    def expire(self, now: float, absent: Callable[[], bool]) -> None:
        """Shed what has waited for too long. `absent()` says whether no worker is ready."""
        for queue in self.classes:
            for state, waits in queue.waits.items():
                while waits:
                    oldest = next(iter(waits))
                    if now - oldest.since < queue.limits[state]:
                        break
                    if state is WaitState.WAITING and self.policy.hold and absent():
                        self._hold(oldest, now)
                    else:
                        self._end(oldest, WaitEvent.SHED, ShedReason.EXPIRED)

    def wake_at(self, now: float) -> float:
        """When `expire` or `next` will have to do something because time has passed; infinite: never."""
        times = [each for each in self._overtaken.values() if each > now][:1]
        for queue in self.classes:
            for state, waits in queue.waits.items():
                if waits:
                    times.append(next(iter(waits)).since + queue.limits[state])
        return min(times, default=math.inf)

    def remove(self, waiting: Waiting) -> None:
        """Its client has left. Does nothing if it no longer waits."""
        if waiting.waits:
            self._end(waiting, WaitEvent.LEFT, None)
        else:
            waiting.state = wait_transition(waiting.state, WaitEvent.LEFT)

    def close(self) -> None:
        """The router ends: shed everything."""
        for queue in self.classes:
            for waits in queue.waits.values():
                for waiting in tuple(waits):
                    self._end(waiting, WaitEvent.SHED, ShedReason.SHUTTING_DOWN)

    def _overfull(self) -> bool:
        return self.size > self.policy.max_bytes or self.waiting > self.policy.max_requests

    def _shed_newest(self, queue: ClassQueue) -> None:
        self._end(queue.flows.largest().newest, WaitEvent.SHED, ShedReason.SATURATED)

    def _placed(self, waiting: Waiting, tokens: int, passed: list[Waiting], now: float) -> Waiting:
        for each in passed:
            if each.overtaken_at is None:
                each.overtaken_at = now
                self._overtaken[each] = now + self.policy.overtaken
        if self._full:
            self._placed_behind += 1
            if self._placed_behind >= MAX_FULL:
                self._begin_anew()
        waiting.queue.flows.take(waiting.flow, waiting.size, tokens)
        self._leave(waiting, WaitEvent.PLACED)
        waiting.on_end(None)
        return waiting

    def _end(self, waiting: Waiting, event: WaitEvent, reason: ShedReason | None) -> None:
        waiting.queue.flows.remove(waiting.flow, waiting, waiting.size)
        self._leave(waiting, event)
        if reason is not None:
            waiting.on_end(reason)

    def _hold(self, waiting: Waiting, now: float) -> None:
        del waiting.queue.waits[waiting.state][waiting]
        waiting.state, waiting.since = wait_transition(waiting.state, WaitEvent.NO_WORKER), now
        waiting.queue.waits[waiting.state][waiting] = None

    def _leave(self, waiting: Waiting, event: WaitEvent) -> None:
        del waiting.queue.waits[waiting.state][waiting]
        waiting.state = wait_transition(waiting.state, event)
        self._overtaken.pop(waiting, None)
        waiting.queue.size -= waiting.size
        self.size -= waiting.size
        self.waiting -= 1
