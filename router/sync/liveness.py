"""Who is alive: asks workers that no feed vouches for, and lets go of those that have fallen silent."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

import aiohttp

from router.core.fleet import Fleet
from router.metrics import Metrics
from router.upstream.in_flight import Attempts
from runtime.backoff import Backoff
from runtime.draining import DRAINING_HEADER

PROBE_INTERVAL = 1.0
LONGEST_INTERVAL = 5.0
TICK = 0.25


class Prober:
    """Asks one worker's /health each second for as long as `needed()`, and beside that when `now` is called, at most
    once a second too. A worker that refuses connections is asked ever more rarely, whoever calls.

    200: alive and serving (`draining`: it says that it leaves); 503: alive, but it takes nothing new; anything else is
    no sign of life.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        needed: Callable[[], bool],
        answered: Callable[[int, bool], None],
        refused: Callable[[str], None],
        interval: float = PROBE_INTERVAL,
        longest: float = LONGEST_INTERVAL,
    ) -> None:
        self._url = url
        self._session = session
        self._needed = needed
        self._answered = answered
        self._refused = refused
        self._interval = interval
        self._longest = longest
        self._refusal_backoff = Backoff(interval, longest)
        self._asked = False
        self._asked_at = -math.inf
        """When a request for a probe was last met at once."""
        self._woken = asyncio.Event()
        self._refusals = 0

    def now(self) -> None:
        """Probe at once, needed or not; but not again within the interval, and not while it refuses connections."""
        self._asked = True
        now = asyncio.get_running_loop().time()
        if not self._refusals and now - self._asked_at >= self._interval:
            self._asked_at = now
            self._woken.set()

    def at_once(self) -> None:
        """Probe now: something else has shown that somebody listens there again."""
        self._asked = True
        self._refusals = 0
        self._woken.set()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            self._woken.clear()
            pause = min(self._interval, self._longest)
            if self._asked or self._needed():
                await self._probe()
                self._asked = False  # a refusal asks for a probe: this one must not be the reason for the next
                pause = self._refusal_backoff.delay(max(self._refusals, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._woken.wait()

    async def _probe(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._interval)
        refused = False
        try:
            async with self._session.get(self._url + "/health", timeout=timeout, allow_redirects=False) as response:
                self._answered(response.status, DRAINING_HEADER in response.headers)
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # silence: the fleet's own time-out decides when it has lasted too long
        self._refusals = self._refusals + 1 if refused else 0
        if refused:
            self._refused("its /health refuses connections")


class Ticker:
    """Four times a second: workers that have been silent too long leave the candidates, pauses and ejections end, and
    requests that waited too long for a worker's next byte are given up."""

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
        self._attempts.sweep(now, self._fleet.silence)
