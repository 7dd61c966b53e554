"""The Envoy beside this router that is its data plane: the workers that it is told of, and its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import aiohttp
import orjson

from router.picker.endpoints import endpoint_of
from runtime.envoy.bootstrap import CLIENTS, endpoints
from runtime.logs import EventLogger

logger = EventLogger(__name__)

INTERVAL = 0.1
"""Seconds between two looks at the workers, or at what Envoy still has to do."""
ADMIN_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
_ACTIVE = f"http.{CLIENTS}.downstream_rq_active"


class EndpointsFile:
    """The file with the workers that Envoy follows. It stays when this process ends, and Envoy goes on by it."""

    def __init__(self, path: Path, urls: Callable[[], Iterable[str]]) -> None:
        self._path = path
        self._urls = urls
        self._written: frozenset[str] = frozenset()
        self._version = 0

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

    async def run(self) -> None:
        while True:
            try:
                if self.update():
                    logger.info("envoy_endpoints_written", workers=len(self._written))
            except OSError as error:
                logger.error("envoy_endpoints_not_written", path=str(self._path), why=str(error))
            await asyncio.sleep(INTERVAL)


class EnvoyAdmin:
    """Envoy's administration interface, a Unix socket. Whether Envoy answers changes nothing here."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._session = aiohttp.ClientSession(
            "http://envoy", connector=aiohttp.UnixConnector(str(path)), timeout=ADMIN_TIMEOUT
        )
        self._clock = clock

    async def _ask(self, method: str, path: str) -> bytes | None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.request(method, path) as answer:
                return await answer.read() if answer.ok else None
        return None

    async def join(self) -> None:
        """Clients may keep their connections: an earlier process may have said that they may not."""
        await self._ask("POST", "/healthcheck/ok")

    async def leave(self) -> None:
        """Envoy is not ready any more, and closes each connection after the answer that is on its way."""
        await self._ask("POST", "/healthcheck/fail")

    async def active(self) -> int:
        """Requests in progress; 0 if Envoy does not answer."""
        answer = await self._ask("GET", f"/stats?format=json&filter=^{_ACTIVE}$")
        if answer is None:
            return 0
        return sum(int(each["value"]) for each in orjson.loads(answer)["stats"] if each.get("name") == _ACTIVE)

    async def idle(self, seconds: float) -> None:
        """Return when no request is in progress, at the latest after so many seconds."""
        end = self._clock() + seconds
        while self._clock() < end and await self.active():  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(INTERVAL)

    async def close(self) -> None:
        await self._session.close()
