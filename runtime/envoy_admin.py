"""The administration interface of an Envoy beside this process, at a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson

from runtime.envoy.bootstrap import CLIENTS
from runtime.envoy.clusters import WORKERS
from runtime.logs import EventLogger

T = TypeVar("T")
logger = EventLogger(__name__)

INTERVAL = 0.1
"""Seconds between two questions about what Envoy still has to do."""
TIMEOUT = aiohttp.ClientTimeout(total=1.0)
_ACTIVE = f"http.{CLIENTS}.downstream_rq_active"


class EnvoyAdmin:
    """What is asked of Envoy. Whether it answers changes nothing here. Must be created inside the event loop."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._session = aiohttp.ClientSession(
            "http://envoy", connector=aiohttp.UnixConnector(str(path)), timeout=TIMEOUT
        )
        self._clock = clock

    async def _report(self, path: str, parse: Callable[[Any], T]) -> T | None:
        """What `parse` makes of a report in JSON; None if Envoy does not answer, or answers something else: the process
        at the socket may be no Envoy, or one that is just ending."""
        answer = await self._ask("GET", path)
        if answer is None:
            return None
        try:
            return parse(orjson.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("envoy_admin_unreadable", path=path, why=repr(error))
            return None

    async def _ask(self, method: str, path: str) -> bytes | None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.request(method, path) as answer:
                return await answer.read() if answer.ok else None
        return None

    async def _stat(self, name: str) -> int | None:
        return await self._report(
            f"/stats?format=json&filter=^{name}$",
            lambda report: sum(int(each["value"]) for each in report["stats"] if each.get("name") == name),
        )

    async def ready(self) -> bool:
        """Whether Envoy takes requests."""
        return await self._ask("GET", "/ready") is not None

    async def healthy(self, cluster: str) -> int:
        """How many hosts of a cluster are healthy; 0 if Envoy does not answer."""
        return await self._stat(f"cluster.{cluster}.membership_healthy") or 0

    async def knows(self, workers: Iterable[str]) -> bool:
        """Whether it has read of all these workers, each `ip:port`; True if it does not answer."""
        known = await self._report("/clusters?format=json", _workers)
        return known is None or known >= set(workers)

    async def reads(self, secrets: Iterable[str]) -> bool:
        """Whether it has taken all these secrets (`runtime.envoy.tls`): without one its port answers nobody. True if it
        does not answer."""
        return 0 not in [await self._stat(f"sds.{name}.update_success") for name in secrets]

    async def join(self) -> None:
        """Clients may keep their connections: an earlier process may have said that they may not."""
        await self._ask("POST", "/healthcheck/ok")

    async def leave(self) -> None:
        """Envoy is not ready any more, and closes each connection after the answer that is on its way."""
        await self._ask("POST", "/healthcheck/fail")

    async def drain(self) -> None:
        """Envoy closes each connection after the answer that is on its way, and then accepts no more. Returns when it
        does not accept any, or does not answer."""
        if await self._ask("POST", "/drain_listeners?graceful") is not None:
            while await self._listening():  # noqa: ASYNC110  as below
                await asyncio.sleep(INTERVAL)

    async def _listening(self) -> bool:
        # A listener that has stopped stays an active one in Envoy's count.
        stopped, active = "listener_manager.listener_stopped", "listener_manager.total_listeners_active"
        return (await self._stat(stopped) or 0) < (await self._stat(active) or 0)

    async def active(self) -> int:
        """Requests in progress; 0 if Envoy does not answer."""
        return await self._stat(_ACTIVE) or 0

    async def idle(self, seconds: float) -> None:
        """Return when no request is in progress, at the latest after so many seconds."""
        end = self._clock() + seconds
        while self._clock() < end and await self.active():  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(INTERVAL)

    async def close(self) -> None:
        await self._session.close()


def _workers(report: Any) -> set[str]:
    """The workers that a report on clusters names, each `ip:port`."""
    return {
        _endpoint(**host["address"]["socket_address"])
        for cluster in report["cluster_statuses"]
        if cluster["name"] == WORKERS
        for host in cluster.get("host_statuses", ())
    }


def _endpoint(address: str, port_value: int, **_: object) -> str:
    return f"[{address}]:{port_value}" if ":" in address else f"{address}:{port_value}"
