"""Decides when the feed publishes: the events of a step at once, a changed load at a limited rate, and a keep-alive
when nothing changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvcache.feed import Event, Load
from worker.feed.log import FeedLog

LOAD_INTERVAL = 0.02
"""Shortest time between two load reports without events, in seconds."""

KEEPALIVE_INTERVAL = 1.0
"""Longest time without an event for a subscriber, in seconds."""


class FeedPublisher:
    """Publishes into a `FeedLog`. `clock` gives seconds, as fast as the event loop's clock."""

    def __init__(self, feed: FeedLog, clock: Callable[[], float]) -> None:
        self._feed = feed
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._latest = feed.load
        self._published_at = float("-inf")
        self._pending: asyncio.TimerHandle | None = None
        self._keepalive: asyncio.TimerHandle | None = None

    def publish(self, events: Sequence[Event], load: Load) -> None:
        """Publish events, or a load that differs from the last one published."""
        self._latest = load
        if events:
            self._feed.publish(events, load)
            self._published()
        elif load != self._feed.load and self._pending is None:
            wait = self._published_at + LOAD_INTERVAL - self._clock()
            if wait <= 0:
                self._publish_load()
            else:
                self._pending = self._loop.call_later(wait, self._publish_load)

    def keep_alive(self) -> None:
        """There is a subscriber. While there is one, something is published at least every `KEEPALIVE_INTERVAL`."""
        if self._keepalive is None:
            self._keepalive = self._loop.call_later(KEEPALIVE_INTERVAL, self._publish_keepalive)

    @property
    def armed(self) -> bool:
        """Whether a timer is set. Without subscribers and changes none is."""
        return self._pending is not None or self._keepalive is not None

    def close(self) -> None:
        """Stop the timers."""
        for timer in (self._pending, self._keepalive):
            if timer is not None:
                timer.cancel()

    def _publish_load(self) -> None:
        self._feed.publish_load(self._latest)
        self._published()

    def _published(self) -> None:
        self._published_at = self._clock()
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    def _publish_keepalive(self) -> None:
        self._keepalive = None
        if not self._feed.subscribers:
            return
        wait = self._published_at + KEEPALIVE_INTERVAL - self._clock()
        if wait <= 0:
            self._publish_load()
            wait = KEEPALIVE_INTERVAL
        self._keepalive = self._loop.call_later(wait, self._publish_keepalive)
