"""Discovery for a router whose data plane is an Envoy: Envoy is told of new workers before the router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.sources import Discovery, DiscoveryStatus
from router.picker.envoy import EndpointsFile

CONFIRMATION = 1.0
"""Seconds for which new workers are kept back at most until Envoy knows them."""
LOOK = 0.02
"""Seconds between two looks at which workers Envoy knows."""


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
    ) -> None:
        """`reads`: whether Envoy has read of these workers, each `ip:port`; `known`: URLs of the workers that the
        router has already, some of which register with it by themselves."""
        self._source = source
        self._reads = reads
        self._latest: DiscoveredWorkers = {}
        self.file = EndpointsFile(path, lambda: {*self._latest, *known()})

    def status(self) -> DiscoveryStatus:
        return self._source.status()

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
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
