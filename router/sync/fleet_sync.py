"""Keeps the fleet in step with discovery: one subscriber and one prober for each worker there is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from router.core.errors import UnknownWorker
from router.core.fleet import Fleet
from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.sources import Discovery
from router.metrics import Metrics
from router.sync.liveness import Prober
from router.sync.subscriber import FeedPolicy, Subscriber
from router.upstream.in_flight import Attempts
from router.upstream.interface import Cause, Upstream
from runtime.logs import event

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """What the router keeps running for one worker."""

    listing: DiscoveredWorker
    subscriber: Subscriber
    prober: Prober
    tasks: tuple[asyncio.Task[None], ...]
    reachable: bool = False
    health: Intake = Intake.OPEN
    """What its /health says of new requests."""

    @property
    def intake(self) -> Intake:
        """What it does with new requests: the graver of what its source and itself say."""
        return max(self.listing.intake, self.health)


class Members:
    """Follows a `Discovery`. Every change that may make a worker ready sets `changed`."""

    def __init__(
        self,
        fleet: Fleet,
        attempts: Attempts,
        upstream: Upstream,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        changed: asyncio.Event,
        feed_policy: FeedPolicy | None = None,
    ) -> None:
        self._fleet = fleet
        self._attempts = attempts
        self._upstream = upstream
        self._session = session
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._changed = changed
        self._feed_policy = feed_policy
        self._members: dict[str, _Member] = {}

    async def follow(self, discovery: Discovery) -> None:
        """Apply every membership the discovery yields."""
        async for membership in discovery.watch():
            self.apply(membership)

    def apply(self, membership: DiscoveredWorkers) -> None:
        """Add workers that are new, remove those that are gone, note those that take nothing new.

        Another pod at the address of an earlier one is another worker: nothing of the earlier one is kept.
        """
        for url, member in list(self._members.items()):
            listing = membership.get(url)
            if listing is None or not listing.continues(member.listing):
                self._remove(url)
        for url, listing in membership.items():
            known = self._members.get(url)
            member = known or self._add(url, listing)
            before = member.intake if known else Intake.OPEN
            member.listing = listing
            self._set_intake(url, member, before)

    def pod(self, url: str) -> str:
        """Name of the pod at this URL; empty if it is not known."""
        member = self._members.get(url)
        return member.listing.pod if member is not None else ""

    async def stop(self) -> None:
        """End every subscriber and prober."""
        tasks = [task for member in self._members.values() for task in member.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what the other parts of the shell report ---

    def unreachable(self, url: str, why: str) -> None:
        """Its address refuses connections. It stays out until its feed or its /health answers again."""
        member = self._members.get(url)
        if member is None or member.reachable:
            event(logger, logging.WARNING, "worker_unreachable", worker=url, why=why)
        if member is not None:
            member.reachable = False
            member.subscriber.gone()
            member.prober.now()
        with contextlib.suppress(UnknownWorker):  # it may have been removed while a request was on its way to it
            self._fleet.set_reachable(url, False, self._clock(), why)
        self._attempts.give_up(url, Cause.BROKEN, why)

    def busy(self, url: str) -> None:
        """It turned a request away, or its feed ended: ask whether it is draining."""
        member = self._members.get(url)
        if member is not None:
            member.prober.now()

    # --- internals ---

    def _add(self, url: str, listing: DiscoveredWorker) -> _Member:
        event(logger, logging.INFO, "worker_added", worker=url, **_where(listing))
        self._fleet.add(url, feed_vouches=listing.feed is None)
        subscriber = Subscriber(
            url,
            self._fleet,
            self._session,
            self._metrics,
            clock=self._clock,
            rng=self._rng,
            up=lambda: self._feed_up(url),
            ended=lambda: self.busy(url),
            down=lambda why: self.unreachable(url, why),
            feed=listing.feed,
            policy=self._feed_policy,
        )
        prober = Prober(
            url,
            self._session,
            needed=lambda: self._needs_probe(url),
            answered=lambda status, draining: self._health(url, status, draining),
            refused=lambda why: self.unreachable(url, why),
        )
        tasks = (asyncio.create_task(subscriber.run()), asyncio.create_task(prober.run()))
        member = self._members[url] = _Member(listing, subscriber, prober, tasks)
        return member

    def _remove(self, url: str) -> None:
        member = self._members.pop(url)
        event(logger, logging.INFO, "worker_removed", worker=url, **_where(member.listing))
        for task in member.tasks:
            task.cancel()
        self._fleet.remove(url)
        self._attempts.give_up(url, Cause.LEFT, "it was removed")
        self._upstream.forget(url)

    def _needs_probe(self, url: str) -> bool:
        member = self._members[url]
        return not (member.subscriber.vouches and member.reachable and member.health is Intake.OPEN)

    def _feed_up(self, url: str) -> None:
        self._up(url)
        member = self._members[url]
        if member.health is not Intake.OPEN:
            member.prober.at_once()  # another process may listen there by now

    def _up(self, url: str) -> None:
        member = self._members[url]
        if not member.reachable:
            event(logger, logging.INFO, "worker_reachable", worker=url)
        member.reachable = True
        now = self._clock()
        self._fleet.heard(url, now)
        self._fleet.set_reachable(url, True, now, "")
        self._changed.set()

    def _health(self, url: str, status: int, draining: bool) -> None:
        member = self._members[url]
        if status not in (200, 503):
            return
        before = member.intake
        member.health = Intake.CLOSED if status == 503 else Intake.DRAINING if draining else Intake.OPEN
        self._set_intake(url, member, before)
        self._up(url) if status == 200 else self._fleet.heard(url, self._clock())

    def _set_intake(self, url: str, member: _Member, before: Intake) -> None:
        intake = member.intake
        if intake is before:
            return
        event(logger, logging.INFO, f"worker_{_WORDS[intake]}", worker=url)
        self._fleet.set_intake(url, intake)
        if intake is not Intake.CLOSED:
            self._changed.set()


_WORDS = {Intake.OPEN: "serving", Intake.DRAINING: "draining", Intake.CLOSED: "closed"}


def _where(listing: DiscoveredWorker) -> dict[str, str]:
    """Fields of a log line: what is known of the worker beside its URL."""
    return {name: value for name, value in (("pod", listing.pod), ("feed", listing.feed)) if value}
