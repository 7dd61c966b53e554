"""Keeps the fleet in step with discovery: one feed subscriber and one health prober for each worker there is."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import aiohttp

from router.core.errors import UnknownWorker
from router.core.fleet import Fleet
from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.sources import Discovery
from router.metrics import Metrics
from router.sync.liveness import Prober
from router.sync.subscriber import FeedPolicy, Subscriber
from router.upstream.in_flight import InFlight
from router.upstream.interface import FailureCause, Upstream
from runtime.logs import EventLogger

logger = EventLogger(__name__)


@dataclass(slots=True)
class _WorkerTasks:
    """What the router runs for one worker, and what it has learnt of the worker's readiness."""

    discovered: DiscoveredWorker
    subscriber: Subscriber
    prober: Prober
    tasks: tuple[asyncio.Task[None], ...]
    reachable: bool = False
    health: Intake = Intake.OPEN
    """What the worker's /health says about new requests."""

    @property
    def intake(self) -> Intake:
        """What the worker does with new requests: the more restrictive of what discovery and its /health say."""
        return max(self.discovered.intake, self.health)


@dataclass(eq=False)
class FleetSync:
    """Follows a `Discovery`. Every change that may make a worker ready sets `changed`."""

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
    _workers: dict[str, _WorkerTasks] = field(default_factory=dict, init=False)

    async def follow(self, discovery: Discovery) -> None:
        """Apply every list of workers that discovery yields."""
        async for discovered in discovery.watch():
            self.apply(discovered)

    def apply(self, discovered: DiscoveredWorkers) -> None:
        """Add workers that are new, remove those that are gone, and note those that take no new requests.

        Another pod at the address of an earlier one is another worker: nothing known of the earlier one is kept.
        """
        for url, worker in list(self._workers.items()):
            now_discovered = discovered.get(url)
            if now_discovered is None or not now_discovered.continues(worker.discovered):
                self._remove(url)
        for url, now_discovered in discovered.items():
            known = self._workers.get(url)
            worker = known or self._add(url, now_discovered)
            before = worker.intake if known else Intake.OPEN
            worker.discovered = now_discovered
            self._note_intake(url, worker, before)

    def pod(self, url: str) -> str:
        """Name of the pod at this URL; empty if it is not known."""
        worker = self._workers.get(url)
        return worker.discovered.pod if worker is not None else ""

    async def stop(self) -> None:
        """End every subscriber and prober."""
        tasks = [task for worker in self._workers.values() for task in worker.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what other parts of the router report ---

    def unreachable(self, url: str, why: str) -> None:
        """The worker's address refuses connections. It is not routed to until its feed or its /health answers again."""
        worker = self._workers.get(url)
        if worker is None or worker.reachable:
            logger.warning("worker_unreachable", worker=url, why=why)
        if worker is not None:
            worker.reachable = False
            worker.subscriber.forget_position()
            worker.prober.request_probe()
        with contextlib.suppress(UnknownWorker):  # it may have been removed while a request was on its way to it
            self.fleet.mark_unreachable(url, why)
        self.in_flight.abort_pending(url, FailureCause.BROKEN, why)

    def busy(self, url: str) -> None:
        """The worker turned a request away, or its feed ended: probe it, to learn whether it drains."""
        worker = self._workers.get(url)
        if worker is not None:
            worker.prober.request_probe()

    # --- internals ---

    def _add(self, url: str, discovered: DiscoveredWorker) -> _WorkerTasks:
        logger.info("worker_added", worker=url, **_log_fields(discovered))
        self.fleet.add(url, feed_proves_liveness=discovered.feed is None)
        subscriber = Subscriber(
            url,
            self.fleet,
            self.session,
            self.metrics,
            clock=self.clock,
            rng=self.rng,
            on_connected=lambda: self._feed_connected(url),
            on_disconnected=lambda: self.busy(url),
            on_refused=lambda why: self.unreachable(url, why),
            feed=discovered.feed,
            policy=self.feed_policy,
        )
        prober = Prober(
            url,
            self.session,
            needed=lambda: self._needs_probe(url),
            on_answer=lambda status, draining: self._probed(url, status, draining),
            on_refused=lambda why: self.unreachable(url, why),
        )
        tasks = (asyncio.create_task(subscriber.run()), asyncio.create_task(prober.run()))
        worker = self._workers[url] = _WorkerTasks(discovered, subscriber, prober, tasks)
        return worker

    def _remove(self, url: str) -> None:
        worker = self._workers.pop(url)
        logger.info("worker_removed", worker=url, **_log_fields(worker.discovered))
        for task in worker.tasks:
            task.cancel()
        self.fleet.remove(url)
        self.in_flight.abort_pending(url, FailureCause.LEFT, "it was removed")
        self.upstream.remove(url)

    def _needs_probe(self, url: str) -> bool:
        worker = self._workers[url]
        return not (worker.subscriber.proves_liveness and worker.reachable and worker.health is Intake.OPEN)

    def _feed_connected(self, url: str) -> None:
        self._reached(url)
        worker = self._workers[url]
        if worker.health is not Intake.OPEN:
            worker.prober.probe_now()  # another process may listen there by now

    def _reached(self, url: str) -> None:
        worker = self._workers[url]
        if not worker.reachable:
            logger.info("worker_reachable", worker=url)
        worker.reachable = True
        self.fleet.mark_alive(url, self.clock())
        self.changed.set()

    def _probed(self, url: str, status: int, draining: bool) -> None:
        worker = self._workers[url]
        if status not in (200, 503):
            return
        before = worker.intake
        worker.health = Intake.CLOSED if status == 503 else Intake.DRAINING if draining else Intake.OPEN
        self._note_intake(url, worker, before)
        self._reached(url) if status == 200 else self.fleet.mark_alive(url, self.clock())

    def _note_intake(self, url: str, worker: _WorkerTasks, before: Intake) -> None:
        intake = worker.intake
        if intake is before:
            return
        logger.info(_INTAKE_EVENTS[intake], worker=url)
        self.fleet.set_intake(url, intake)
        if intake is not Intake.CLOSED:
            self.changed.set()


_INTAKE_EVENTS = {Intake.OPEN: "worker_serving", Intake.DRAINING: "worker_draining", Intake.CLOSED: "worker_closed"}


def _log_fields(discovered: DiscoveredWorker) -> dict[str, str]:
    """What is known of the worker besides its URL."""
    return {name: value for name, value in (("pod", discovered.pod), ("feed", discovered.feed)) if value}
