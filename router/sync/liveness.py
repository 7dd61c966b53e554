"""Which workers are alive: probes those whose feed does not prove it, and drops those that have fallen silent."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import aiohttp

from router.core.fleet import Fleet
from router.metrics import Metrics
from router.upstream.in_flight import InFlight
from runtime.backoff import Backoff
from runtime.draining import DRAINING_HEADER

PROBE_INTERVAL = 1.0
LONGEST_INTERVAL = 5.0
"""Seconds between two probes of a worker: of one that answers, and at most of one that refuses connections."""
TICK = 0.25
"""Seconds between two looks at everything that has a timeout."""


@dataclass(eq=False)
class Prober:
    """Asks one worker's /health once a second for as long as `needed()` holds, and in addition when `request_probe` is
    called, which is at most once a second too. A worker that refuses connections is probed less and less often, whoever
    asks.

    `on_answer(status, draining)`: 200 means alive and serving (`draining`: about to leave), 503 means alive but taking
    nothing new; any other status is no sign of life. `on_refused(why)`: the worker refuses connections.
    """

    url: str
    session: aiohttp.ClientSession
    _: KW_ONLY
    needed: Callable[[], bool]
    on_answer: Callable[[int, bool], None]
    on_refused: Callable[[str], None]
    interval: float = PROBE_INTERVAL
    longest: float = LONGEST_INTERVAL
    _refusal_backoff: Backoff = field(init=False)
    _requested: bool = field(default=False, init=False)
    _requested_at: float = field(default=-math.inf, init=False)
    """When a requested probe was last made at once."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _refusals: int = field(default=0, init=False)
    """Refused connections in a row."""

    def __post_init__(self) -> None:
        self._refusal_backoff = Backoff(self.interval, self.longest)

    def request_probe(self) -> None:
        """Probe, needed or not: at once, but not twice within the interval, and not while connections are refused."""
        self._requested = True
        now = asyncio.get_running_loop().time()
        if not self._refusals and now - self._requested_at >= self.interval:
            self._requested_at = now
            self._wake.set()

    def probe_now(self) -> None:
        """Probe at once in any case: something else has shown that a process listens there again."""
        self._requested = True
        self._refusals = 0
        self._wake.set()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            self._wake.clear()
            pause = min(self.interval, self.longest)
            if self._requested or self.needed():
                await self._probe()
                self._requested = False  # `on_refused` requests a probe: a refusal must not be the reason for the next
                pause = self._refusal_backoff.delay(max(self._refusals, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _probe(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self.interval)
        refused = False
        try:
            async with self.session.get(self.url + "/health", timeout=timeout, allow_redirects=False) as response:
                self.on_answer(response.status, DRAINING_HEADER in response.headers)
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # the worker is silent: the fleet's liveness timeout decides when that has lasted too long
        self._refusals = self._refusals + 1 if refused else 0
        if refused:
            self.on_refused("its /health refuses connections")


@dataclass(eq=False)
class Ticker:
    """Enforces timeouts four times a second: workers that have been silent too long are no longer routed to, pauses and
    ejections end, and requests that have waited too long for a worker's next byte are aborted.

    `on_silent(url, why)` is called for each worker that is no longer routed to.
    """

    fleet: Fleet
    in_flight: InFlight
    metrics: Metrics
    clock: Callable[[], float]
    on_silent: Callable[[str, str], None]

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            due = self.clock() + TICK
            await asyncio.sleep(TICK)
            now = self.clock()
            self.metrics.loop_lag.observe(max(now - due, 0.0))
            self.tick(now)

    def tick(self, now: float) -> None:
        """Enforce every timeout once."""
        for url in self.fleet.expire(now):
            self.on_silent(url, "it has been silent for too long")
        self.in_flight.enforce_timeouts(now, self.fleet.silent_for)
