"""Keeps the fleet in step with discovery: a health prober for each process of workers, and a feed subscriber for each
of its data-parallel ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import aiohttp

from kvcache.feed import WorkerInfo
from kvcache.ranks import rank_url, split_rank
from router.core.fleet import Fleet
from router.core.retries import FailureCause
from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.sources import Discovery
from router.metrics import Metrics
from router.sync.liveness import Prober
from router.sync.subscriber import FeedPolicy, Subscriber
from router.upstream.in_flight import InFlight
from router.upstream.interface import Upstream
from runtime.logs import EventLogger

logger = EventLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Rank:
    """What the router runs for one worker: the only one of its process, or one data-parallel rank of several."""

    url: str
    subscriber: Subscriber
    following: asyncio.Task[None]


@dataclass(slots=True)
class _Process:
    """One process of workers, at one address: what the router runs for it, and what it has learnt of its readiness."""

    discovered: DiscoveredWorker
    prober: Prober
    probing: asyncio.Task[None]
    ranks: list[_Rank] = field(default_factory=list)
    """In the order of their numbers; never empty."""
    reachable: bool = False
    health: Intake = Intake.OPEN
    """What its /health says about new requests."""

    @property
    def intake(self) -> Intake:
        """What it does with new requests: the more restrictive of what discovery and its /health say."""
        return max(self.discovered.intake, self.health)


@dataclass(eq=False)
class FleetSync:
    """Follows a `Discovery`. Every change that may make a worker ready sets `changed`.

    Discovery names processes. How many data-parallel ranks a process has is known from the feed of its first one; each
    is a worker of its own. What is learnt of a process (that it is alive, drains or is gone) holds for all its ranks.
    """

    fleet: Fleet
    in_flight: InFlight
    upstream: Upstream
    session: aiohttp.ClientSession
    metrics: Metrics
    _: KW_ONLY
    clock: Callable[[], float]
    rng: random.Random
    changed: asyncio.Event
    feed_policy: FeedPolicy = field(default_factory=FeedPolicy)
    _processes: dict[str, _Process] = field(default_factory=dict, init=False)
    """By address."""

    async def follow(self, discovery: Discovery) -> None:
        """Apply every list of workers that discovery yields."""
        async for discovered in discovery.watch():
            self.apply(discovered)

    def apply(self, discovered: DiscoveredWorkers) -> None:
        """Add workers that are new, remove those that are gone, and note those that take no new requests.

        Another pod at the address of an earlier one is another worker: nothing known of the earlier one is kept.
        """
        for address, process in list(self._processes.items()):
            now_discovered = discovered.get(address)
            if now_discovered is None or not now_discovered.continues(process.discovered):
                self._remove(address)
        for address, now_discovered in discovered.items():
            known = self._processes.get(address)
            process = known or self._add(address, now_discovered)
            before = process.intake if known else Intake.OPEN
            process.discovered = now_discovered
            self._note_intake(address, process, before)

    def pod(self, url: str) -> str:
        """Name of the pod of the worker at this URL; empty if it is not known."""
        process = self._processes.get(split_rank(url)[0])
        return process.discovered.pod if process is not None else ""

    async def stop(self) -> None:
        """End every subscriber and prober."""
        tasks = [task for process in self._processes.values() for task in _tasks(process)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what other parts of the router report ---

    def unreachable(self, url: str, why: str) -> None:
        """The worker's address refuses connections. No rank there is routed to until a feed or its /health answers
        again."""
        address, _ = split_rank(url)
        process = self._processes.get(address)
        if process is None or process.reachable:
            logger.warning("worker_unreachable", worker=address, why=why)
        if process is not None:
            process.reachable = False
            process.prober.request_probe()
            for rank in process.ranks:
                rank.subscriber.forget_position()
        for each in self.fleet.directory.ranks(url):
            self.fleet.mark_unreachable(each, why)
            self.in_flight.abort_pending(each, FailureCause.BROKEN, why)

    def busy(self, url: str) -> None:
        """The worker turned a request away, or its feed ended: probe it, to learn whether it drains."""
        process = self._processes.get(split_rank(url)[0])
        if process is not None:
            process.prober.request_probe()

    # --- internals ---

    def _add(self, address: str, discovered: DiscoveredWorker) -> _Process:
        logger.info("worker_added", worker=address, **_log_fields(discovered))
        prober = Prober(
            address,
            self.session,
            needed=lambda: self._needs_probe(address),
            on_answer=lambda status, draining: self._probed(address, status, draining),
            on_refused=lambda why: self.unreachable(address, why),
        )
        process = _Process(discovered, prober, asyncio.create_task(prober.run()))
        self._processes[address] = process
        self._add_rank(address, process)
        return process

    def _add_rank(self, address: str, process: _Process) -> str:
        """The next rank of the process. Returns its URL."""
        feed, first = process.discovered.feed, not process.ranks
        url = rank_url(address, len(process.ranks))
        self.fleet.add(url, feed_proves_liveness=feed is None)
        subscriber = Subscriber(
            url,
            self.fleet,
            self.session,
            self.metrics,
            clock=self.clock,
            rng=self.rng,
            on_connected=lambda: self._feed_connected(address),
            on_disconnected=lambda: self.busy(address),
            on_refused=lambda why: self.unreachable(address, why),
            on_described=(lambda info: self._described(address, info)) if first else lambda info: None,
            feed=feed,
            policy=self.feed_policy,
        )
        process.ranks.append(_Rank(url, subscriber, asyncio.create_task(subscriber.run())))
        return url

    def _described(self, address: str, info: WorkerInfo) -> None:
        """The first rank's feed says how many ranks there are."""
        process = self._processes[address]
        before = len(process.ranks)
        while len(process.ranks) > info.ranks:
            self._remove_rank(process.ranks.pop(), "it has fewer ranks now")
        while len(process.ranks) < info.ranks:
            url = self._add_rank(address, process)
            self.fleet.set_intake(url, process.intake)
            if process.reachable:
                self.fleet.mark_alive(url, self.clock())
        if len(process.ranks) != before:
            logger.info("worker_ranks", worker=address, ranks=info.ranks)
            self.changed.set()

    def _remove(self, address: str) -> None:
        process = self._processes.pop(address)
        logger.info("worker_removed", worker=address, **_log_fields(process.discovered))
        process.probing.cancel()
        for rank in process.ranks:
            self._remove_rank(rank, "it was removed")

    def _remove_rank(self, rank: _Rank, why: str) -> None:
        rank.following.cancel()
        self.fleet.remove(rank.url)
        self.in_flight.abort_pending(rank.url, FailureCause.LEFT, why)
        self.upstream.remove(rank.url)

    def _needs_probe(self, address: str) -> bool:
        process = self._processes[address]
        proven = all(rank.subscriber.proves_liveness for rank in process.ranks)
        return not (proven and process.reachable and process.health is Intake.OPEN)

    def _feed_connected(self, address: str) -> None:
        self._reached(address)
        process = self._processes[address]
        if process.health is not Intake.OPEN:
            process.prober.probe_now()  # another process may listen there by now

    def _reached(self, address: str) -> None:
        process = self._processes[address]
        if not process.reachable:
            logger.info("worker_reachable", worker=address)
        process.reachable = True
        self._mark_alive(process)
        self.changed.set()

    def _mark_alive(self, process: _Process) -> None:
        for rank in process.ranks:
            self.fleet.mark_alive(rank.url, self.clock())

    def _probed(self, address: str, status: int, draining: bool) -> None:
        process = self._processes[address]
        if status not in (200, 503):
            return
        before = process.intake
        process.health = Intake.CLOSED if status == 503 else Intake.DRAINING if draining else Intake.OPEN
        self._note_intake(address, process, before)
        self._reached(address) if status == 200 else self._mark_alive(process)

    def _note_intake(self, address: str, process: _Process, before: Intake) -> None:
        intake = process.intake
        if intake is before:
            return
        logger.info(_INTAKE_EVENTS[intake], worker=address)
        for rank in process.ranks:
            self.fleet.set_intake(rank.url, intake)
        if intake is not Intake.CLOSED:
            self.changed.set()


_INTAKE_EVENTS = {Intake.OPEN: "worker_serving", Intake.DRAINING: "worker_draining", Intake.CLOSED: "worker_closed"}


def _log_fields(discovered: DiscoveredWorker) -> dict[str, str]:
    """What is known of the worker besides its URL."""
    return {name: value for name, value in (("pod", discovered.pod), ("feed", discovered.feed)) if value}


def _tasks(process: _Process) -> list[asyncio.Task[None]]:
    return [process.probing, *(rank.following for rank in process.ranks)]
