"""A router in virtual time: the product's fleet and retry rules, its view of each worker, and the requests that it has.

It does what `router.server.proxy`, `router.sync` and `router.upstream.in_flight` do, without sockets; the comments name
the rule that each part repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import partial
from typing import Protocol

from bench.simulation.admission import SimulatedAdmission
from bench.simulation.clock import VirtualClock
from bench.simulation.cluster import Delays
from bench.simulation.worker import KEEPALIVE_INTERVAL, ProcessEvent, ProcessState, SimulatedWorker, transition
from kvcache.feed import Batch, Snapshot
from router.core.fleet import Fleet, FleetConfig
from router.core.flow import FlowPolicy
from router.core.outliers import Outcome
from router.core.retries import Refusals, RetryBudget, RetryPolicy
from router.core.worker_state import Intake
from runtime.backoff import Backoff

RECONNECT = Backoff(0.05, 1.0)
"""Pauses of a subscriber whose worker refuses connections (`router.sync.subscriber.FeedPolicy`)."""
STALL_TIMEOUT = 10.0
"""Seconds without a sign of life after which what a worker has not begun to answer goes elsewhere (the router's
default)."""
CUT_TIMEOUT = 60.0
"""Seconds without a sign of life after which answers that have begun are cut off (the router's default)."""
RETRY_SHARE = 0.2
RETRY_FLOOR = 10.0
"""The retry budget of the router's defaults."""


class LinkState(Enum):
    """What a router's subscription to the feed of one worker does."""

    SYNCING = auto()
    """A snapshot is on its way."""
    FOLLOWING = auto()
    """Batches are applied as they come."""
    CUT = auto()
    """Nothing of the feed reaches the router; requests and probes do."""
    REFUSED = auto()
    """No process listens at the worker's address: it is tried again and again."""
    ENDED = auto()
    """The worker or the router has left."""


class LinkEvent(Enum):
    """What happens to a subscription."""

    SNAPSHOT_ASKED = auto()
    SNAPSHOT_APPLIED = auto()
    CUT = auto()
    BROKEN = auto()
    """The worker's process ended."""
    ENDED = auto()


_OPEN = (LinkState.SYNCING, LinkState.FOLLOWING, LinkState.CUT, LinkState.REFUSED)
LINK_TRANSITIONS: Mapping[tuple[LinkState, LinkEvent], LinkState] = {
    (LinkState.SYNCING, LinkEvent.SNAPSHOT_APPLIED): LinkState.FOLLOWING,
    **{(state, LinkEvent.SNAPSHOT_ASKED): LinkState.SYNCING for state in _OPEN},
    **{(state, LinkEvent.CUT): LinkState.CUT for state in _OPEN},
    **{(state, LinkEvent.BROKEN): LinkState.REFUSED for state in _OPEN if state is not LinkState.CUT},
    **{(state, LinkEvent.ENDED): LinkState.ENDED for state in _OPEN},
}


def link_transition(state: LinkState, event: LinkEvent) -> LinkState:
    """The state after `event`. An event changes nothing in a state for which no transition is listed."""
    return LINK_TRANSITIONS.get((state, event), state)


class FeedLink:
    """One router's subscription to the feed of one worker (`router.sync.subscriber.Subscriber`)."""

    __slots__ = ("_failures", "_fleet", "_router", "_version", "delay", "state", "worker")

    def __init__(self, router: SimulatedRouter, worker: SimulatedWorker) -> None:
        self._router = router
        self._fleet = router.fleet
        self.worker = worker
        self.delay = router.delays.feed
        self.state = LinkState.SYNCING
        self._failures = 0
        self._version = 0
        """Of the latest attempt to connect: what earlier ones bring is ignored."""

    def receive(self, batch: Batch, now: float) -> None:
        """A batch arrives. Those on the way while a snapshot is taken are part of that snapshot."""
        if self.state is LinkState.FOLLOWING and batch.epoch == self.worker.info.epoch:
            self._fleet.apply_batch(self.worker.url, batch, now)

    def connect(self, now: float) -> None:
        """Ask for a snapshot; the worker takes it after the feed's delay."""
        self._enter(LinkEvent.SNAPSHOT_ASKED)
        self._version += 1
        self._router.clock.at(now + self.delay, partial(self._asked, self._version))

    def install(self, snapshot: Snapshot, now: float) -> None:
        """A snapshot is there."""
        self._enter(LinkEvent.SNAPSHOT_APPLIED)
        self._fleet.apply_snapshot(self.worker.url, snapshot, now)

    def broken(self, now: float) -> None:
        """The stream ends with the worker's process, which the router sees after the feed's delay."""
        before = self.state
        self._enter(LinkEvent.BROKEN)
        if self.state is LinkState.REFUSED and before is not LinkState.REFUSED:
            self._failures = 1
            self._version += 1
            self._router.clock.at(now + self.delay + RECONNECT.delay(1), partial(self._again, self._version))

    def cut(self, now: float) -> None:
        """From now on nothing of the feed arrives."""
        self._version += 1
        self._enter(LinkEvent.CUT)

    def end(self) -> None:
        """The worker or the router has left."""
        self._version += 1
        self._enter(LinkEvent.ENDED)

    def probe(self, now: float) -> None:
        """A worker whose feed does not prove that it is alive is asked for its /health (`router.sync.liveness`)."""
        if self.state in (LinkState.CUT, LinkState.SYNCING) and self.worker.serving:
            self._fleet.mark_alive(self.worker.url, now)

    def _asked(self, version: int, now: float) -> None:
        """The request for a snapshot arrives at the worker."""
        if version != self._version:
            return
        worker, clock = self.worker, self._router.clock
        if worker.state is ProcessState.STOPPED:
            clock.at(now + self.delay, partial(self._refused, version))
        elif worker.state is ProcessState.FROZEN:
            clock.at(now + KEEPALIVE_INTERVAL / 2, partial(self._asked, version))  # it answers when it can
        else:
            clock.at(now + self.delay, partial(self._synchronised, version, worker.snapshot()))

    def _synchronised(self, version: int, snapshot: Snapshot, now: float) -> None:
        if version != self._version:
            return
        self._failures = 0
        self.install(snapshot, now)
        self._router.changed(now)

    def _refused(self, version: int, now: float) -> None:
        if version != self._version:
            return
        self._enter(LinkEvent.BROKEN)
        self._failures += 1
        self._router.unreachable(self.worker.url, now)
        if self._router.busy():
            self._router.clock.at(now + RECONNECT.delay(self._failures), partial(self._again, version))

    def _again(self, version: int, now: float) -> None:
        if version == self._version:
            self.connect(now)

    def _enter(self, event: LinkEvent) -> None:
        self.state = link_transition(self.state, event)


class Pending(Protocol):
    """A request at a router, as the router knows it."""

    url: str
    """Of the worker that has it; empty: none has."""

    def choose(self, now: float) -> None:
        """Look again for a worker: one may have become ready."""

    def lose_worker(self, now: float) -> None:
        """Nobody listens at the address of its worker."""

    def stalled(self, silent: float, now: float) -> None:
        """Its worker has been silent for so long."""

    def lose_router(self, now: float) -> None:
        """The router's process ended."""


class SimulatedRouter:
    """One router. `busy()` says whether anything is still to come that a router is needed for."""

    def __init__(
        self,
        number: int,
        clock: VirtualClock,
        config: FleetConfig,
        delays: Delays,
        busy: Callable[[], bool],
        flow: FlowPolicy | None = None,
    ) -> None:
        self.number = number
        self.clock = clock
        self.delays = delays
        self.busy = busy
        self.policy = RetryPolicy()
        self.state = ProcessState.RUNNING
        self._config = config
        self._flow = flow
        self._boot()

    def _boot(self) -> None:
        """A new process, which knows no worker."""
        self.fleet = Fleet(self._config)
        self.admission = SimulatedAdmission(self.clock, self.fleet, self._flow) if self._flow is not None else None
        """Where requests wait while all workers are busy; None: in the workers."""
        self.budget = RetryBudget(share=RETRY_SHARE, floor=RETRY_FLOOR)
        self.refusals = Refusals()
        self.links: dict[str, FeedLink] = {}
        """By the worker's URL."""
        self.requests: dict[str, Pending] = {}
        """The requests in progress, by id."""
        self.waiting: dict[str, Pending] = {}
        """Those of them that wait for a worker."""

    @property
    def serving(self) -> bool:
        """Whether its Service sends it requests."""
        return self.state is ProcessState.RUNNING

    # --- workers ---

    def discover(self, worker: SimulatedWorker, now: float, *, known: bool = False) -> None:
        """Discovery names a worker. `known`: its first snapshot is there already, as for all workers at the start."""
        if self.state is not ProcessState.RUNNING:
            return
        self.fleet.add(worker.url)
        link = self.links[worker.url] = FeedLink(self, worker)
        worker.subscriptions.append(link)
        if known:
            link.install(worker.snapshot(), now)
        else:
            link.connect(now)

    def drain(self, url: str, now: float) -> None:
        """Discovery says that a worker is about to leave."""
        if url in self.links:
            self.fleet.set_intake(url, Intake.DRAINING)

    def forget(self, url: str, now: float) -> None:
        """Discovery no longer names a worker."""
        link = self.links.pop(url, None)
        if link is None:
            return
        link.end()
        link.worker.subscriptions.remove(link)
        self.fleet.remove(url)
        self._lose(url, now)

    def unreachable(self, url: str, now: float) -> None:
        """Nobody listens at a worker's address (`FleetSync.unreachable`)."""
        if url in self.links:
            self.fleet.mark_unreachable(url, "it refuses connections")
            self._lose(url, now)
            link = self.links[url]
            if link.state is LinkState.FOLLOWING:
                link.broken(now)

    def _lose(self, url: str, now: float) -> None:
        for request in [each for each in self.requests.values() if each.url == url]:
            request.lose_worker(now)

    def changed(self, now: float) -> None:
        """A worker may have become ready: every request that waits for one looks again."""
        for request in tuple(self.waiting.values()):
            self.clock.at(now, request.choose)

    def note(self, url: str, outcome: Outcome, now: float) -> None:
        """How a worker dealt with a request."""
        self.fleet.answered(url, outcome, now)

    def tick(self, now: float) -> None:
        """Enforce what has a time-out: silent workers, pauses, ejections, stalled requests (`router.sync.liveness`)."""
        if self.state is not ProcessState.RUNNING:
            return
        for link in self.links.values():
            if link.state is not LinkState.FOLLOWING:
                link.probe(now)
        self.fleet.expire(now)
        for url, link in self.links.items():
            if link.worker.state is ProcessState.FROZEN:
                silent = self.fleet.silent_for(url, now)
                for request in [each for each in self.requests.values() if each.url == url]:
                    request.stalled(silent, now)

    # --- the router's own process ---

    def kill(self, now: float) -> None:
        """The process ends at once: its connections break, and all that it knows is lost."""
        self.state = transition(self.state, ProcessEvent.ENDED)
        for link in self.links.values():
            link.end()
            link.worker.subscriptions.remove(link)
        for request in tuple(self.requests.values()):
            request.lose_router(now)
        self._boot()

    def start(self, workers: Mapping[str, SimulatedWorker], now: float) -> None:
        """Another process starts, and discovers these workers."""
        if self.state is ProcessState.STOPPED:
            self.state = transition(self.state, ProcessEvent.STARTED)
            for worker in workers.values():
                self.discover(worker, now)
                if worker.state is ProcessState.DRAINING:
                    self.drain(worker.url, now)
