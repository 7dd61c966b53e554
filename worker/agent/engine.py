"""The engine's HTTP API as the agent uses it: health, metrics, models, `/tokenize` and the loading of adapters."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from worker.agent.core.load import MetricsError, Scrape, parse_scrapes
from worker.agent.prompts import Tokenized
from worker.lora.keeper import AdapterRefusedError

TIMEOUT = 3.0
"""Seconds after which an engine that does not answer counts as unreachable. A router waits as long for a feed."""


ADAPTER_TIMEOUT = 600.0
"""Seconds that an engine may take to load an adapter, which it may have to download."""


class Models(NamedTuple):
    """What an engine serves."""

    names: tuple[str, ...]
    """Those of its model."""
    adapters: Mapping[str, str]
    """Its LoRA adapters: where each was loaded from, by name."""


def parse_models(text: str) -> Models:
    """Of an answer of `/v1/models`. What is no list of models names none."""
    try:
        cards = json.loads(text)["data"]
        listed = [(card["id"], card.get("parent"), card.get("root")) for card in cards]
    except (ValueError, KeyError, TypeError, AttributeError):
        return Models((), {})
    return Models(
        tuple(str(name) for name, parent, _ in listed if parent is None),
        {str(name): str(root or "") for name, parent, root in listed if parent is not None},
    )


def _words(status: int, text: str) -> str:
    """Why the engine refused, in its own words."""
    if status == 404 and '"detail"' in text:
        return "the engine does not load adapters at run time: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the engine answers {status}"


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

    async def models(self) -> Models:
        """What it serves. Raises `EngineError`."""
        try:
            async with asyncio.timeout(TIMEOUT):
                status, text = await self._request("GET", "/v1/models")
        except TimeoutError:
            raise EngineError(f"{self._url}/v1/models does not answer within {TIMEOUT:g} s") from None
        return parse_models(text) if status == 200 else Models((), {})

    async def load_adapter(self, name: str, source: str, *, replace: bool) -> None:
        """Raises `AdapterRefusedError`."""
        body = {"lora_name": name, "lora_path": source, **({"load_inplace": True} if replace else {})}
        await self._change_adapters("/v1/load_lora_adapter", body)

    async def unload_adapter(self, name: str) -> None:
        """Raises `AdapterRefusedError`."""
        await self._change_adapters("/v1/unload_lora_adapter", {"lora_name": name})

    async def _change_adapters(self, path: str, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(ADAPTER_TIMEOUT):
                status, text = await self._request("POST", path, body)
        except TimeoutError:
            raise AdapterRefusedError(f"{path} does not answer within {ADAPTER_TIMEOUT:g} s") from None
        except EngineError as error:
            raise AdapterRefusedError(str(error)) from None
        if status != 200:
            raise AdapterRefusedError(_words(status, text))

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


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """An `AdapterEngine` at this URL. Each call has a connection of its own: it may last for minutes."""

    url: str

    async def load_adapter(self, name: str, source: str, *, replace: bool) -> None:
        """Raises `AdapterRefusedError`."""
        async with engine_client(self.url) as client:
            await client.load_adapter(name, source, replace=replace)

    async def unload_adapter(self, name: str) -> None:
        """Raises `AdapterRefusedError`."""
        async with engine_client(self.url) as client:
            await client.unload_adapter(name)
