"""The Envoy beside this router that is its data plane: the workers that it is told of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson

from router.picker.endpoints import endpoint_of
from runtime.envoy.bootstrap import endpoints
from runtime.logs import EventLogger

logger = EventLogger(__name__)

INTERVAL = 0.1
"""Seconds between two looks at the workers."""


class EndpointsFile:
    """The file with the workers that Envoy follows. It stays when this process ends, and Envoy goes on by it."""

    def __init__(self, path: Path, urls: Callable[[], Iterable[str]]) -> None:
        self._path = path
        self._urls = urls
        self._written: frozenset[str] = frozenset()
        self._version = 0

    @property
    def written(self) -> frozenset[str]:
        """`ip:port` of the workers in the file."""
        return self._written

    def update(self) -> bool:
        """Write the file if the workers have changed; whether it did.

        No workers at all are not written: a router that has just started knows none yet, and Envoy finds out by itself
        which of those that there were do not answer.
        """
        found = frozenset(endpoint for url in self._urls() if (endpoint := endpoint_of(url)) is not None)
        if not found or found == self._written:
            return False
        self._version += 1
        replacement = self._path.with_suffix(".new")
        replacement.write_bytes(orjson.dumps(endpoints(sorted(found), self._version)))
        replacement.replace(self._path)  # Envoy reads it when it is moved to its place
        self._written = found
        return True

    def try_update(self) -> bool:
        """The same, where a file that cannot be written is logged."""
        try:
            if self.update():
                logger.info("envoy_endpoints_written", workers=len(self._written))
                return True
        except OSError as error:
            logger.error("envoy_endpoints_not_written", path=str(self._path), why=str(error))
        return False

    async def run(self) -> None:
        while True:
            self.try_update()
            await asyncio.sleep(INTERVAL)
