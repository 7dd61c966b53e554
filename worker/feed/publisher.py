"""Decides when the feed speaks: events of a step at once, load reports as they change but not too often, and a
sign of life when there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvcache.feed import Event, Load
from worker.feed.log import FeedLog

LOAD_INTERVAL = 0.02
"""Shortest time between two load reports without events, seconds."""

KEEPALIVE_INTERVAL = 1.0
"""Longest silence towards a subscriber, seconds."""


class FeedPublisher:
    """Publishes into a `FeedLog`. `clock` must agree with the event loop's idea of a second."""

    def __init__(self, feed: FeedLog, clock: Callable[[], float]) -> None:
        self._feed = feed
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._latest = feed.load
        self._spoke_at = float("-inf")
        self._pending: asyncio.TimerHandle | None = None
        self._alive: asyncio.TimerHandle | None = None

    def publish(self, events: Sequence[Event], load: Load) -> None:
        """What changed. Without events, a load that equals the last one reported is no change."""
        self._latest = load
        if events:
            self._feed.publish(events, load)
            self._spoken()
        elif load != self._feed.load and self._pending is None:
            wait = self._spoke_at + LOAD_INTERVAL - self._clock()
            if wait <= 0:
                self._speak()
            else:
                self._pending = self._loop.call_later(wait, self._speak)

    def keep_alive(self) -> None:
        """A subscriber has come: from now on, and as long as there is one, no silence lasts longer than a second."""
        if self._alive is None:
            self._alive = self._loop.call_later(KEEPALIVE_INTERVAL, self._sign)

    def close(self) -> None:
        """Say no more."""
        for timer in (self._pending, self._alive):
            if timer is not None:
                timer.cancel()

    def _speak(self) -> None:
        self._feed.publish_load(self._latest)
        self._spoken()

    def _spoken(self) -> None:
        self._spoke_at = self._clock()
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    def _sign(self) -> None:
        self._alive = None
        if not self._feed.subscribers:
            return
        wait = self._spoke_at + KEEPALIVE_INTERVAL - self._clock()
        if wait <= 0:
            self._speak()
            wait = KEEPALIVE_INTERVAL
        self._alive = self._loop.call_later(wait, self._sign)
