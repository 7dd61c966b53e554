"""Push: tells a router about this worker, where routers cannot come and read the feed (outside a cluster).

Every second a heartbeat, every five seconds (and whenever the router asks for it) the whole cache, and in between
what was evicted. One task a router; its messages go out in order.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
import orjson

from kvcache.feed import (
    JSON,
    MSGPACK,
    Event,
    Eviction,
    Heartbeat,
    Removed,
    encode_eviction,
    encode_heartbeat,
    encode_snapshot,
)
from kvcache.keys import BlockKey
from kvcache.logs import event
from worker.feed import FeedLog
from worker.server.feed import CacheState

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 1.0
SYNC_INTERVAL = 5.0
EVICTION_INTERVAL = 0.1
"""Evictions are collected for so long: an engine under pressure evicts with every step."""

TIMEOUT = 2.0
FIRST_RETRY = 0.5
LAST_RETRY = 5.0
"""Seconds between attempts while the router is away: doubled from the first to the last, with jitter."""

MAX_EVICTIONS = 65_536
"""Keys waiting to be pushed; beyond this they are dropped and a sync is due instead."""


class PushError(Exception):
    """The router did not take a message; the message says why."""


class Pusher:
    """Keeps one router informed. `url` is where the router reaches this worker."""

    def __init__(self, router_url: str, url: str, state: CacheState, feed: FeedLog) -> None:
        self.router_url = router_url
        self.url = url
        self._state = state
        self._feed = feed
        self._evicted: list[BlockKey] = []
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._heartbeat_due = self._sync_due = 0.0
        self.failures = 0
        """Messages that the router did not take."""
        self.connected: bool | None = None
        """None before the first attempt has ended."""

    async def run(self) -> None:
        """Push until cancelled."""
        self._feed.listen(self._on_events)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        retry = FIRST_RETRY
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
            while True:
                try:
                    await self._push_what_is_due(session)
                except (aiohttp.ClientError, TimeoutError, OSError, PushError) as error:
                    self.failures += 1
                    self._changed(False, str(error) or type(error).__name__)
                    self._sync_due = 0.0
                    self._evicted.clear()
                    await asyncio.sleep(retry * random.uniform(0.5, 1.0))
                    retry = min(2 * retry, LAST_RETRY)
                    self._heartbeat_due = 0.0
                else:
                    retry = FIRST_RETRY
                    self._changed(True, "")
                    await self._until_due()

    def _on_events(self, events: Sequence[Event]) -> None:
        for change in events:
            if isinstance(change, Removed):
                self._evicted.extend(change.keys)
        if len(self._evicted) > MAX_EVICTIONS:
            self._evicted.clear()
            self._sync_due = 0.0
        if self._evicted:
            self._wake.set()

    async def _push_what_is_due(self, session: aiohttp.ClientSession) -> None:
        if self._evicted:
            keys, self._evicted = tuple(self._evicted), []
            info = self._state.info
            message = Eviction(info.worker_id, info.epoch, self._feed.seq, keys)
            await self._post(session, "eviction", encode_eviction(message), JSON)
        now = self._loop.time()
        if now >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_INTERVAL
            beat = Heartbeat(self._state.info, self.url, self._feed.seq, self._state.load())
            answer = await self._post(session, "heartbeat", encode_heartbeat(beat), JSON)
            if answer.get("resync") is True:
                self._sync_due = 0.0
        if now >= self._sync_due:
            self._sync_due = now + SYNC_INTERVAL
            self._evicted.clear()
            await self._post(session, "sync", encode_snapshot(self._state.snapshot(), MSGPACK), MSGPACK)

    async def _until_due(self) -> None:
        """Sleep until the next heartbeat or sync; an eviction ends it earlier, but not at once."""
        self._wake.clear()
        due = min(self._heartbeat_due, self._sync_due)
        try:
            async with asyncio.timeout_at(due):
                if not self._evicted:
                    await self._wake.wait()
                await asyncio.sleep(EVICTION_INTERVAL)
        except TimeoutError:
            pass

    async def _post(self, session: aiohttp.ClientSession, what: str, body: bytes, media_type: str) -> dict[str, object]:
        """The answer's JSON object. Raises `PushError` for anything but 2xx with one."""
        async with session.post(
            f"{self.router_url}/internal/{what}", data=body, headers={"content-type": media_type}
        ) as response:
            answer = await response.read()
            if not 200 <= response.status < 300:
                raise PushError(f"{what} refused: {response.status} {answer[:200].decode(errors='replace')}")
        try:
            parsed = orjson.loads(answer or b"{}")
        except orjson.JSONDecodeError:
            raise PushError(
                f"{what}: the answer is not JSON; is {self.router_url} a router's management port?"
            ) from None
        return parsed if isinstance(parsed, dict) else {}

    def _changed(self, connected: bool, why: str) -> None:
        if connected == self.connected:
            return
        self.connected = connected
        if connected:
            event(logger, logging.INFO, "router_reached", router=self.router_url, as_url=self.url)
        else:
            event(logger, logging.WARNING, "router_lost", router=self.router_url, why=why)


def advertised_url(host: str, port: int, router_url: str) -> str:
    """Where the router at `router_url` reaches a server that listens on `host`.

    A server on every address is advertised under the one that this machine uses towards the router.
    """
    if host in ("", "0.0.0.0", "::"):  # noqa: S104
        host = _address_towards(router_url)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address_towards(url: str) -> str:
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # chooses a route and an address, sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
