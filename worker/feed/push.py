"""Push: keeps a router informed that cannot read the worker's feed, as outside a cluster.

The worker sends a heartbeat every second, its whole cache every five seconds and whenever the router asks for it, and
evictions in between. Each router has one task, which sends the messages in order.

Only the blocks of group 0 on the GPU are pushed: a router would not learn in time what the other tiers and groups have
lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import aiohttp
import orjson

from kvcache.feed import (
    JSON,
    MSGPACK,
    Event,
    Eviction,
    Heartbeat,
    Removed,
    Tier,
    encode_eviction,
    encode_heartbeat,
    encode_snapshot,
)
from kvcache.keys import BlockKey
from runtime.backoff import Backoff
from runtime.http.hosts import PROGRAM_HEADERS
from runtime.http.tokens import TokenFileError, parse, token_headers
from runtime.logs import EventLogger
from worker.feed.endpoints import CacheState
from worker.feed.log import FeedLog

logger = EventLogger(__name__)

HEARTBEAT_INTERVAL = 1.0
SYNC_INTERVAL = 5.0
EVICTION_INTERVAL = 0.1
"""Seconds for which evictions are collected: an engine that is short of blocks evicts in every step."""

CLOCK_RESOLUTION = 0.001
"""Seconds by which a timer of the event loop may fire early, because its clock is coarse."""

TIMEOUT = 2.0
BACKOFF = Backoff(0.5, 5.0)
"""Between attempts while the router is away."""

MAX_EVICTIONS = 65_536
"""Evicted keys that may wait. Beyond this they are dropped, and a sync is due instead."""


class PushError(Exception):
    """The router did not take a message; the message says why."""


class Post(Protocol):
    """Sends one message to the router."""

    async def __call__(self, path: str, body: bytes, media_type: str) -> bytes:
        """The body of the router's answer. Raises `PushError` if it cannot be reached or does not take the message."""


@contextlib.asynccontextmanager
async def posting_to(router_url: str, token_file: Path | None = None) -> AsyncIterator[Post]:
    """A connection to the router's management port, which stays open between messages. The first line of `token_file`,
    read each time, lets it in."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=1)) as session:

        async def post(path: str, body: bytes, media_type: str) -> bytes:
            headers = {"content-type": media_type, **PROGRAM_HEADERS}
            try:
                if token_file is not None:
                    headers |= token_headers(parse(await asyncio.to_thread(token_file.read_bytes))[0])
                async with session.post(router_url + path, data=body, headers=headers) as answer:
                    data = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError, TokenFileError) as error:
                raise PushError(str(error) or type(error).__name__) from None
            if not 200 <= answer.status < 300:
                raise PushError(f"{path} refused: {answer.status} {data[:200].decode(errors='replace')}")
            return data

        yield post


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

    async def run(self, post: Post) -> None:
        """Push until cancelled. Attempts to reach an absent router are spaced out by the back-off."""
        self._feed.listen(self._on_events)
        failures = 0
        while True:
            try:
                await self._push_what_is_due(post)
            except PushError as error:
                self.failures += 1
                self._set_connected(False, str(error))
                failures += 1
                await asyncio.sleep(BACKOFF.delay(failures, random.random()))
                self._evicted.clear()
                self._heartbeat_due = self._sync_due = 0.0
            else:
                failures = 0
                self._set_connected(True, "")
                await self._until_due()

    def _on_events(self, events: Sequence[Event]) -> None:
        for change in events:
            if isinstance(change, Removed) and change.tier is Tier.GPU and not change.group:
                self._evicted.extend(change.keys)
        if len(self._evicted) > MAX_EVICTIONS:
            self._evicted.clear()
            self._sync_due = 0.0
        if self._evicted:
            self._wake.set()

    async def _push_what_is_due(self, post: Post) -> None:
        info = self._state.info
        if self._evicted:
            keys, self._evicted = tuple(self._evicted), []
            await post(
                "/internal/eviction", encode_eviction(Eviction(info.worker_id, info.epoch, self._feed.seq, keys)), JSON
            )
        now = self._loop.time()
        if now + CLOCK_RESOLUTION >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_INTERVAL
            beat = Heartbeat(info, self.url, self._feed.seq, self._state.load())
            if _asks_for_resync(await post("/internal/heartbeat", encode_heartbeat(beat), JSON)):
                self._sync_due = 0.0
        if now + CLOCK_RESOLUTION >= self._sync_due:
            self._sync_due = now + SYNC_INTERVAL
            self._evicted.clear()
            pushed = replace(self._state.snapshot(), elsewhere=())
            await post("/internal/sync", encode_snapshot(pushed, MSGPACK), MSGPACK)

    async def _until_due(self) -> None:
        """Sleep until the next heartbeat or sync is due, or `EVICTION_INTERVAL` after an eviction."""
        self._wake.clear()
        due = min(self._heartbeat_due, self._sync_due)
        try:
            async with asyncio.timeout_at(due):
                if not self._evicted:
                    await self._wake.wait()
                await asyncio.sleep(EVICTION_INTERVAL)
        except TimeoutError:
            pass

    def _set_connected(self, connected: bool, why: str) -> None:
        if connected == self.connected:
            return
        self.connected = connected
        if connected:
            logger.info("router_reached", router=self.router_url, as_url=self.url)
        else:
            logger.warning("router_lost", router=self.router_url, why=why)


def _asks_for_resync(answer: bytes) -> bool:
    try:
        return orjson.loads(answer).get("resync") is True
    except (orjson.JSONDecodeError, AttributeError):
        raise PushError("the heartbeat's answer is no JSON object; is this a router's management port?") from None
