"""Runs one reconciler over the keys that need it, again and again until each is as it should be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tests.kube.kubelet.client import TRANSIENT, ApiError, Key

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.02
LONGEST_DELAY = 1.0

Reconcile = Callable[[Key], Awaitable[float | None]]
"""Brings one key nearer to what it should be; the seconds after which to look again without being asked, if any."""


class WorkQueue:
    """Keys that wait for `reconcile`, each at most once. What fails is tried again after a growing delay."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile
        self._waiting: dict[Key, None] = {}
        self._work = asyncio.Event()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """The key needs to be looked at."""
        self._waiting[key] = None
        self._work.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        try:
            while True:
                await self._work.wait()
                while self._waiting:
                    key = next(iter(self._waiting))
                    del self._waiting[key]
                    await self._process(key)
                self._work.clear()
        finally:
            for timer in self._timers.values():
                timer.cancel()

    async def _process(self, key: Key) -> None:
        try:
            again = await self._reconcile(key)
        except (ApiError, *TRANSIENT) as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            again = min(FIRST_DELAY * 2**failures, LONGEST_DELAY)
            logger.info("%s of %s: %r", getattr(self._reconcile, "__qualname__", ""), "/".join(key), error)
        else:
            self._failures.pop(key, None)
        if again is not None:
            if key in self._timers:
                self._timers[key].cancel()
            self._timers[key] = asyncio.get_running_loop().call_later(again, self.add, key)
