"""The lines of the access log as server-sent events on the management port: for `kvcluster record`, and for debugging.

Nothing is done for a request while nobody reads. Events are `request` (a JSON object with the fields of the access log)
and `dropped` (`{"count": n}`: so many requests were left out because the reader was too slow).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Response

from kvcache.keys import PrefixKeys
from router.server.access_log import Digests, fields
from router.server.record import RequestRecord
from router.server.recorder import Recorder
from runtime.http.event_stream import KEEP_ALIVE, EventStream, StreamLimit, set_within

READERS = 8
"""Streams that are open at one time, at most."""
QUEUED_EVENTS = 1024
QUEUED_BYTES = 16 * 2**20
"""Of the token ids of prompts whose blocks are still to be digested, for each reader."""
THREAD_BYTES = 65_536
"""The blocks of a prompt with more bytes of token ids than this are digested in a thread."""


class _Subscription:
    """One reader's events that it has not got yet."""

    def __init__(self, digests: Digests, *, blocks: bool) -> None:
        self._digests = digests
        self._blocks = blocks
        self._waiting: deque[tuple[dict[str, Any], PrefixKeys | None]] = deque()
        self._bytes = 0
        self.dropped = 0
        self.closed = False
        self.arrived = asyncio.Event()

    def read(self, record: RequestRecord) -> None:
        """A request is over."""
        keys = record.route.keys if self._blocks and record.route is not None else None
        size = len(keys.packed) if keys is not None else 0
        if len(self._waiting) >= QUEUED_EVENTS or self._bytes + size > QUEUED_BYTES:
            self.dropped += 1
            return
        self._waiting.append((fields(record, self._digests), keys))
        self._bytes += size
        self.arrived.set()

    def close(self) -> None:
        self.closed = True
        self.arrived.set()

    def take(self) -> tuple[dict[str, Any], PrefixKeys | None] | None:
        """The oldest event; None if there is none."""
        if not self._waiting:
            self.arrived.clear()
            return None
        line, keys = self._waiting.popleft()
        self._bytes -= len(keys.packed) if keys is not None else 0
        return line, keys


@dataclass(slots=True)
class RequestEvents:
    """The endpoint `GET /requests/events`."""

    recorder: Recorder
    digests: Digests
    block_size: int
    _limit: StreamLimit = field(init=False)
    _subscriptions: set[_Subscription] = field(default_factory=set, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._limit = StreamLimit(READERS, f"{READERS} readers are connected to this router: end one of them")

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoint."""
        app.add_api_route("/requests/events", self.events, methods=["GET"])

    def close(self) -> None:
        """End every stream, and those that begin from now on."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    async def events(self, blocks: Annotated[bool, Query()] = False) -> Response:
        """Server-sent events: a line of the access log for each request that ends. `?blocks=1`: with the digests of the
        blocks of its prompt."""
        return EventStream(self._stream(blocks), self._limit)

    async def _stream(self, blocks: bool) -> AsyncGenerator[bytes]:
        if self._closed:
            return
        subscription = _Subscription(self.digests, blocks=blocks)
        self._subscriptions.add(subscription)
        self.recorder.readers.append(subscription.read)
        try:
            yield KEEP_ALIVE  # the reader sees that it is subscribed
            told = 0
            while not subscription.closed:
                if (taken := subscription.take()) is not None:
                    yield await self._event(*taken)
                elif subscription.dropped > told:
                    yield b'event: dropped\ndata: {"count":%d}\n\n' % (subscription.dropped - told)
                    told = subscription.dropped
                elif not await set_within(subscription.arrived):
                    yield KEEP_ALIVE
        finally:
            self._subscriptions.discard(subscription)
            self.recorder.readers.remove(subscription.read)

    async def _event(self, line: dict[str, Any], keys: PrefixKeys | None) -> bytes:
        if keys is not None:
            if len(keys.packed) > THREAD_BYTES:
                hashes = await asyncio.to_thread(self.digests.blocks, keys)
            else:
                hashes = self.digests.blocks(keys)
            line.update(block_size=self.block_size, block_hashes=hashes)
        return b"event: request\ndata: %s\n\n" % orjson.dumps(line)
