"""The engine's HTTP side: whether it is well, and how busy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from worker.agent.core.load import MetricsError, Scrape, parse_scrape
from worker.agent.prompts import Tokenized

PATIENCE = 3.0
"""Seconds after which an engine that does not answer counts as unreachable: as long as a router waits for a feed."""


class EngineError(Exception):
    """The engine cannot be used; the message says why."""


class EngineClient:
    """Asks one engine."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def scrape(self) -> Scrape:
        """Health and metrics. Raises `EngineError`."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self._get("/health")
                return parse_scrape(await self._get("/metrics"))
        except TimeoutError:
            raise EngineError(f"{self._url} does not answer within {PATIENCE:g} s") from None
        except MetricsError as error:
            raise EngineError(f"{self._url}/metrics: {error}") from None

    async def tokenize(self, body: dict[str, Any]) -> Tokenized | None:
        """Token ids of a request; None when it is refused, or the engine has no `/tokenize`. Raises `EngineError`."""
        try:
            async with asyncio.timeout(PATIENCE):
                status, text = await self._ask("POST", "/tokenize", body)
        except TimeoutError:
            raise EngineError(f"{self._url}/tokenize does not answer within {PATIENCE:g} s") from None
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
        status, text = await self._ask("GET", path)
        if status != 200:
            raise EngineError(f"{self._url}{path} answers {status}")
        return text

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
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
    """A client with a connection of its own, kept open between questions."""
    timeout = aiohttp.ClientTimeout(total=None)  # `read` bounds all of it
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
        yield EngineClient(url, session)
