"""Asking the routers what they see: over their pods' own addresses, never through the API server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp

from controller.objects.names import COMPONENT_LABEL, MANAGEMENT_PORT, Component, Object
from controller.status.report import ReportError, RouterReport, parse_report

TIMEOUT = 1.5
TRIES = 2
"""A router that does not answer is asked once more: one slow moment is not worth a word in the status."""
MAX_BYTES = 1 << 20
AT_ONCE = 32


class RouterAsker:
    """`GET /status` of every router pod of a cluster, all at once."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def ask(self, pods: Iterable[Object]) -> dict[str, RouterReport | str]:
        """By pod: its report, or in words why there is none. Pods without an address, or ending, are not asked."""
        addresses = {pod["metadata"]["name"]: address(pod) for pod in pods if _askable(pod)}
        answers = await asyncio.gather(*(self._one(url) for url in addresses.values()))
        return dict(zip(addresses, answers, strict=True))

    async def _one(self, url: str) -> RouterReport | str:
        answer: RouterReport | str = ""
        for _ in range(TRIES):
            answer = await self._ask(url)
            if type(answer) is RouterReport:
                break
        return answer

    async def _ask(self, url: str) -> RouterReport | str:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        try:
            async with (
                self._slots,
                self._session.get(f"{url}/status", timeout=timeout, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    return f"it answered {response.status}"
                return parse_report(await _whole(response))
        except ReportError as error:
            return str(error)
        except TimeoutError:
            return f"no answer within {TIMEOUT:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return str(error)


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body to its end, in however many pieces it arrives. Raises `ReportError` for one that is too large."""
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


def _askable(pod: Object) -> bool:
    metadata = pod["metadata"]
    router = metadata.get("labels", {}).get(COMPONENT_LABEL) == Component.ROUTER
    return router and "deletionTimestamp" not in metadata and bool(pod.get("status", {}).get("podIP"))
