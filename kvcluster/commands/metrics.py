"""`kvcluster metrics`: the figures that routers, and the workers behind them, have collected."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from pathlib import Path

import httpx
from rich.console import Console
from rich.measure import Measurement

from kvcluster.figures.exposition import ExpositionError
from kvcluster.figures.figures import Figures, figures
from kvcluster.figures.render import Period, Report, as_csv, as_json, rendered
from kvcluster.figures.scrape import Scrape, ScrapeError, scrape
from kvcluster.options import LOCAL_ROUTER, management_headers, management_url, tls_context
from kvcluster.terminal import exits, output, writing


class Format(StrEnum):
    """How figures are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


async def collect(
    urls: Sequence[str],
    *,
    workers: bool,
    interval: float | None,
    ca: Path | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Report:
    """The figures since the routers' start, and those of the next `interval` seconds if one is given.

    Raises `ScrapeError` if a router cannot be read, `ExpositionError` if the routers are of different versions.
    """
    routers = tuple(dict.fromkeys(map(management_url, urls)))
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(trust_env=False, headers=management_headers(), verify=tls_context(ca)) as client:
        now = await scrape(client, routers, workers=workers)
        if interval is None:
            return Report(routers, (Period("since_start", None, _figures(now)),), now.unread)
        before, began = now, loop.time()
        await sleep(interval)
        now = await scrape(client, routers, workers=workers)
        window = Scrape(
            {url: page.since(before.routers[url]) for url, page in now.routers.items()},
            {url: page.since(before.engines[url]) for url, page in now.engines.items() if url in before.engines},
            now.names,
        )
        periods = (
            Period("since_start", None, _figures(now)),
            Period("window", loop.time() - began, _figures(window)),
        )
        return Report(routers, periods, now.unread)


def _figures(of: Scrape) -> Figures:
    return figures(of.routers.values(), of.engines, of.names)


@exits(ScrapeError, ExpositionError)
def metrics(urls: Sequence[str], *, workers: bool, interval: float | None, form: str, ca: Path | None = None) -> None:
    """Runs the command; returns its exit code."""
    if form not in set(Format):
        raise ValueError(f"--format is one of {', '.join(Format)}, not {form!r}")
    report = asyncio.run(collect(urls or [LOCAL_ROUTER], workers=workers, interval=interval, ca=ca))
    with writing():
        match Format(form):
            case Format.JSON:
                sys.stdout.write(as_json(report))
            case Format.CSV:
                sys.stdout.write(as_csv(report))
            case Format.TABLE:
                _print(report, output())


def _print(report: Report, console: Console) -> None:
    # A name that is cut or broken in two cannot be copied: a narrower terminal breaks the lines itself.
    shown = rendered(report)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=10_000), shown).maximum)
    console.print(shown, highlight=False)
