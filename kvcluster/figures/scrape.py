"""Reads the metrics of routers, and of the workers that they know."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import orjson

from kvcache.ranks import split_rank
from kvcluster.figures.exposition import Exposition, ExpositionError, parse

MAX_BYTES = 64 << 20
"""An answer of more bytes is refused: 500 workers take less than 1 MB."""
ROUTER = "kvcluster_router_"
"""What the names of a router's metrics begin with."""
CONCURRENCY = 32
"""Workers that are asked at the same time."""
TIMEOUT = 10.0


class ScrapeError(RuntimeError):
    """A router's metrics could not be read. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of one moment, by URL."""

    routers: dict[str, Exposition]
    engines: dict[str, Exposition] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """What the workers call themselves."""
    unread: tuple[str, ...] = ()
    """Workers whose metrics could not be read, each with the reason."""


async def scrape(client: httpx.AsyncClient, routers: Sequence[str], *, workers: bool) -> Scrape:
    """The metrics of all these routers, and of the workers that they know if asked. Raises `ScrapeError`.

    A router that cannot be read is an error, because sums without it would be wrong; a worker is only left out.
    """
    pages = await asyncio.gather(*(_page(client, url) for url in routers))
    for url, page in zip(routers, pages, strict=True):
        if not any(name.startswith(ROUTER) for name in page.gauges):
            raise ScrapeError(f"{url}/metrics has no metrics of a router: is this the URL of a management port?")
    if not workers:
        return Scrape(dict(zip(routers, pages, strict=True)))
    known = await asyncio.gather(*(_workers(client, url) for url in routers))
    names = {url: name for each in known for url, name in each.items()}
    gate, unread = asyncio.Semaphore(CONCURRENCY), []

    async def engine(url: str) -> tuple[str, Exposition] | None:
        try:
            async with gate:
                return url, await _page(client, url)
        except ScrapeError as error:
            unread.append(str(error))
            return None

    engines = dict(filter(None, await asyncio.gather(*map(engine, sorted(names)))))
    return Scrape(dict(zip(routers, pages, strict=True)), engines, names, tuple(sorted(unread)))


async def _page(client: httpx.AsyncClient, url: str) -> Exposition:
    body = await _get(client, f"{url}/metrics")
    try:
        return parse(body.decode())
    except (ExpositionError, UnicodeDecodeError) as error:
        raise ScrapeError(f"{url}/metrics: {error}") from None


async def _workers(client: httpx.AsyncClient, url: str) -> dict[str, str]:
    """Addresses of the workers' processes, with their names."""
    try:
        rows = orjson.loads(await _get(client, f"{url}/workers"))["workers"]
        ranks = [(*split_rank(row["url"]), row["worker_id"]) for row in rows]
        return {address: name.removesuffix(f"/{rank}") for address, rank, name in ranks}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ScrapeError(f"{url}/workers is not the list of a router's workers") from None


async def _get(client: httpx.AsyncClient, url: str) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT), client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise ScrapeError(f"{url} answered {answer.status_code}: is this the URL of a management port?")
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > MAX_BYTES:
                    raise ScrapeError(f"{url} answered more than {MAX_BYTES >> 20} MiB")
    except TimeoutError:
        raise ScrapeError(f"{url} did not answer within {TIMEOUT:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ScrapeError(f"{url} cannot be read: {str(error) or repr(error)}") from None
    return bytes(body)
