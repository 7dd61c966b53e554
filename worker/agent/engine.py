"""The engine's HTTP side: whether it is well, and how busy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp

from worker.agent.core.load import MetricsError, Reading, read_metrics

PATIENCE = 3.0
"""Seconds after which an engine that does not answer counts as unreachable: as long as a router waits for a feed."""


class EngineError(Exception):
    """The engine cannot be used; the message says why."""


class EngineClient:
    """Asks one engine."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def read(self) -> Reading:
        """Health and metrics. Raises `EngineError`."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self._get("/health")
                return read_metrics(await self._get("/metrics"))
        except TimeoutError:
            raise EngineError(f"{self._url} does not answer within {PATIENCE:g} s") from None
        except MetricsError as error:
            raise EngineError(f"{self._url}/metrics: {error}") from None

    async def _get(self, path: str) -> str:
        url = self._url + path
        try:
            async with self._session.get(url, allow_redirects=False) as answer:
                text = await answer.text(errors="replace")
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{url}: {error or type(error).__name__}") from None
        if answer.status != 200:
            raise EngineError(f"{url} answers {answer.status}")
        return text


@contextlib.asynccontextmanager
async def engine_client(url: str) -> AsyncIterator[EngineClient]:
    """A client with a connection of its own, kept open between questions."""
    timeout = aiohttp.ClientTimeout(total=None)  # `read` bounds all of it
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
        yield EngineClient(url, session)
