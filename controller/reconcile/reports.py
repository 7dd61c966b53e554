"""Asks routers for their reports, at the addresses of their pods and never through the API server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp

from controller.objects.names import MANAGEMENT_PORT, Component, Object
from controller.status import raw
from controller.status.observed import RouterReports
from controller.status.pods import component_of
from controller.status.report import ReportError, RouterReport, parse_report

TIMEOUT = 1.5
"""Seconds for an answer."""
TRIES = 2
"""A router that does not answer is asked once more, so that one slow moment does not show in the status."""
MAX_BYTES = 1 << 20
CONCURRENCY = 32
"""Requests at the same time, over all clusters."""


class ReportCollector:
    """`GET /status` at every router pod of a cluster, all at the same time."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def collect(self, pods: Iterable[Object]) -> RouterReports:
        """The answers of the routers among these pods. Pods without an address or that terminate are not asked."""
        addresses = {raw.name(pod): address(pod) for pod in pods if _can_be_asked(pod)}
        reports: dict[str, RouterReport] = {}
        errors: dict[str, str] = {}

        async def one(name: str, url: str) -> None:
            for _ in range(TRIES):
                try:
                    reports[name] = await self._ask(url)
                except ReportError as error:
                    errors[name] = str(error)
                else:
                    errors.pop(name, None)
                    return

        await asyncio.gather(*(one(name, url) for name, url in addresses.items()))
        return RouterReports(reports, errors)

    async def _ask(self, url: str) -> RouterReport:
        """Raises `ReportError`."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        try:
            async with (
                self._slots,
                self._session.get(f"{url}/status", timeout=timeout, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise ReportError(f"it answered {response.status}")
                return parse_report(await _read(response))
        except TimeoutError:
            raise ReportError(f"no answer within {TIMEOUT:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ReportError(str(error)) from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, in however many pieces it arrives. Raises `ReportError` for one that is too large."""
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > MAX_BYTES:
            raise ReportError(f"its report takes more than {MAX_BYTES:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def address(pod: Object) -> str:
    """Base URL of a router pod's management port."""
    ip = pod["status"]["podIP"]
    return f"http://[{ip}]:{MANAGEMENT_PORT}" if ":" in ip else f"http://{ip}:{MANAGEMENT_PORT}"


def _can_be_asked(pod: Object) -> bool:
    is_router = component_of(pod) == Component.ROUTER
    return is_router and not raw.is_terminating(pod) and bool(raw.text(pod, "status", "podIP"))
