"""The engine's HTTP API as the agent uses it: health, metrics and `/tokenize`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from worker.agent.core.load import MetricsError, Scrape, parse_scrapes
from worker.agent.prompts import Tokenized

TIMEOUT = 3.0
"""Seconds after which an engine that does not answer counts as unreachable. A router waits as long for a feed."""


class EngineError(Exception):
    """The engine cannot be used; the message says why."""


class EngineClient:
    """A client of one engine."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def scrape(self) -> Sequence[Scrape]:
        """Check the health, and read the metrics of each data-parallel rank. Raises `EngineError`."""
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._get("/health")
                return parse_scrapes(await self._get("/metrics"))
        except TimeoutError:
            raise EngineError(f"{self._url} does not answer within {TIMEOUT:g} s") from None
        except MetricsError as error:
            raise EngineError(f"{self._url}/metrics: {error}") from None

    async def tokenize(self, body: dict[str, Any]) -> Tokenized | None:
        """The token ids of a request, or None if it is refused or the engine has no `/tokenize`. Raises
        `EngineError`."""
        try:
            async with asyncio.timeout(TIMEOUT):
                status, text = await self._request("POST", "/tokenize", body)
        except TimeoutError:
            raise EngineError(f"{self._url}/tokenize does not answer within {TIMEOUT:g} s") from None
        if status >= 500 and status != 501:
            raise EngineError(f"{self._url}/tokenize answers {status}")
        if status != 200:
            return None
        try:
            answer = json.loads(text)
            tokens, longest = answer["tokens"], answer.get("max_model_len")
        except (ValueError, KeyError, TypeError, AttributeError):
            tokens = longest = None
        if not isinstance(tokens, list):
            raise EngineError(f"{self._url}/tokenize answers something else than tokens")
        return Tokenized(tokens, longest if isinstance(longest, int) and longest > 0 else 0)

    async def _get(self, path: str) -> str:
        status, text = await self._request("GET", path)
        if status != 200:
            raise EngineError(f"{self._url}{path} answers {status}")
        return text

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        url = self._url + path
        try:
            async with self._session.request(method, url, json=body, allow_redirects=False) as answer:
                return answer.status, await answer.text(errors="replace")
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{url}: {error or type(error).__name__}") from None


@contextlib.asynccontextmanager
async def engine_client(url: str) -> AsyncIterator[EngineClient]:
    """A client with a connection of its own, which stays open between requests."""
    timeout = aiohttp.ClientTimeout(total=None)  # each method bounds its own time
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
        yield EngineClient(url, session)
