"""Discovery for a router whose data plane is an Envoy: Envoy is told of new workers before the router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.sources import Discovery, DiscoveryStatus
from router.picker.envoy import EndpointsFile
from runtime.logs import EventLogger

logger = EventLogger(__name__)

CONFIRMATION = 1.0
"""Seconds for which new workers are kept back at most until Envoy knows them."""
LOOK = 0.02
"""Seconds between two looks at which workers Envoy knows."""
PATIENCE = 2.0
"""Seconds after which it is said that Envoy does not take its certificate."""


class EnvoyFirst:
    """A discovery whose new workers Envoy knows before the router does.

    Otherwise a request might be given to a worker that Envoy has not read of yet, and go to another one, or fail: of
    the requests that were held until a first worker is there, all would.
    """

    def __init__(
        self,
        source: Discovery,
        path: Path,
        reads: Callable[[Iterable[str]], Awaitable[bool]],
        known: Callable[[], Iterable[str]],
        secured: Callable[[], Awaitable[bool]],
    ) -> None:
        """`reads`: whether Envoy has read of these workers, each `ip:port`; `known`: URLs of the workers that the
        router has already, some of which register with it by themselves; `secured`: whether Envoy has what its port
        needs for TLS. Without that it answers nobody, and this router is not to be ready: it knows no workers."""
        self._source = source
        self._reads = reads
        self._secured = secured
        self._latest: DiscoveredWorkers = {}
        self.file = EndpointsFile(path, lambda: {*self._latest, *known()})

    def status(self) -> DiscoveryStatus:
        return self._source.status()

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        await self._certificate()
        async for workers in self._source.watch():
            before, self._latest = self.file.written, workers
            if self.file.try_update() and self.file.written - before:
                await self._confirmed()
            yield workers

    async def _confirmed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRMATION):
                while not await self._reads(self.file.written):  # noqa: ASYNC110  another process sets no event
                    await asyncio.sleep(LOOK)

    async def _certificate(self) -> None:
        """Return when Envoy has it."""
        waited = 0.0
        while not await self._secured():
            await asyncio.sleep(LOOK)
            if waited < PATIENCE <= waited + LOOK:
                why = "its log says why it does not take it; requests would get no answer, so this router is not ready"
                logger.error("envoy_without_certificate", why=why)
            waited += LOOK
