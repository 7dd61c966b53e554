"""Who is alive: asks workers that no feed vouches for, and lets go of those that have fallen silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import aiohttp

from router.core.fleet import Fleet
from router.server.attempts import Attempts
from router.server.metrics import Metrics

PROBE_INTERVAL = 1.0
TICK = 0.25


class Prober:
    """Asks one worker's /health each second for as long as `needed()`, and once more whenever `now` is called.

    200: alive and serving; 503: alive, but draining (it gets no new requests); anything else is no sign of life.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        needed: Callable[[], bool],
        answered: Callable[[int], None],
        refused: Callable[[str], None],
        interval: float = PROBE_INTERVAL,
    ) -> None:
        self._url = url
        self._session = session
        self._needed = needed
        self._answered = answered
        self._refused = refused
        self._interval = interval
        self._asked = asyncio.Event()

    def now(self) -> None:
        """Probe at once, needed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            if self._asked.is_set() or self._needed():
                self._asked.clear()
                await self._probe()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._asked.wait()

    async def _probe(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._interval)
        try:
            async with self._session.get(self._url + "/health", timeout=timeout, allow_redirects=False) as response:
                self._answered(response.status)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                self._refused("its /health refuses connections")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return  # silence: the fleet's own time-out decides when it has lasted too long


class Ticker:
    """Four times a second: workers that have been silent too long leave the candidates, and requests that waited too
    long for a worker's next byte are given up."""

    def __init__(
        self,
        fleet: Fleet,
        attempts: Attempts,
        metrics: Metrics,
        clock: Callable[[], float],
        left: Callable[[str, str], None],
    ) -> None:
        self._fleet = fleet
        self._attempts = attempts
        self._metrics = metrics
        self._clock = clock
        self._left = left

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            due = self._clock() + TICK
            await asyncio.sleep(TICK)
            now = self._clock()
            self._metrics.loop_lag.observe(max(now - due, 0.0))
            self.tick(now)

    def tick(self, now: float) -> None:
        """One look at everything that waits."""
        for url in self._fleet.expire(now):
            self._left(url, "it has been silent for too long")
        self._attempts.sweep(now)
