"""GET /cache/state and GET /cache/events: the cache feed, as `kvcache.feed` defines it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from kvcache.errors import ApiError
from kvcache.feed import (
    JSON,
    MSGPACK,
    FeedError,
    HeldElsewhere,
    Load,
    Snapshot,
    WorkerInfo,
    decode_position,
    encode_snapshot,
)
from kvcache.keys import BlockKey
from worker.asgi import Header, HttpRequest
from worker.feed.log import FeedLog
from worker.feed.publisher import FeedPublisher

NO_STORE: Header = (b"cache-control", b"no-store")


SHUTTING_DOWN = "The worker is shutting down; its cache is of no more use."


class CacheSource(Protocol):
    """The cache that the feed publishes: an emulated engine's, or the agent's view of a real engine's."""

    def flush(self) -> None:
        """Publish every change up to now."""

    def load(self) -> Load:
        """The engine's present load."""

    def blocks(self) -> Iterable[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every cached block of group 0 on the GPU; a key appears once for each block that holds
        it."""

    def elsewhere(self) -> Iterable[HeldElsewhere]:
        """The blocks of the other tiers and groups."""


class CacheState:
    """Snapshots of the engine's cache that agree with the feed's position. `info` belongs to the feed's epoch."""

    def __init__(self, info: WorkerInfo, source: CacheSource, feed: FeedLog) -> None:
        self.info = info
        self._source = source
        self._feed = feed

    def position(self) -> str:
        """`epoch:seq`, once everything that has happened so far is published."""
        self._source.flush()
        return self._feed.position

    def load(self) -> Load:
        """The engine's present load."""
        return self._source.load()

    def snapshot(self) -> Snapshot:
        """The whole cache: O(blocks)."""
        self._source.flush()
        source = self._source
        return Snapshot(self.info, self._feed.seq, source.load(), tuple(source.blocks()), tuple(source.elsewhere()))


class FeedEndpoints:
    """Both endpoints. `close` ends every stream and refuses new ones, `open` undoes that, `drop` ends the open
    streams."""

    def __init__(self, state: CacheState, feed: FeedLog, publisher: FeedPublisher) -> None:
        self._state = state
        self._feed = feed
        self._publisher = publisher
        self._wakes: set[Callable[[], None]] = set()
        self._closed = ""
        self._drops = 0

    def close(self, why: str = SHUTTING_DOWN) -> None:
        """End every stream, and answer 503 with this reason from now on."""
        self._closed = why
        for wake in tuple(self._wakes):
            wake()

    def drop(self) -> None:
        """End every stream. A router that comes back is served, but asks /health before that."""
        self._drops += 1
        for wake in tuple(self._wakes):
            wake()

    def open(self) -> None:
        """Answer again."""
        self._closed = ""

    async def state(self, request: HttpRequest, service: object) -> None:
        """GET /cache/state: the snapshot, or 304 if `If-None-Match` names the present position."""
        self._check_open()
        etag = f'"{self._state.position()}"'.encode()
        known = request.header(b"if-none-match").encode("latin-1")
        if etag in (tag.strip().removeprefix(b"W/") for tag in known.split(b",")):
            await request.reply(304, b"", (b"etag", etag))
            return
        media_type = MSGPACK if MSGPACK in request.header(b"accept") else JSON
        body = encode_snapshot(self._state.snapshot(), media_type)
        await request.reply(200, body, (b"content-type", media_type.encode()), (b"etag", etag), NO_STORE)

    async def events(self, request: HttpRequest, service: object) -> None:
        """GET /cache/events: what the subscriber missed since `Last-Event-ID`, then every event as it happens.

        The stream ends with a `reset` event if the position cannot be resumed, or the subscriber reads too slowly.
        """
        self._check_open()
        after = _last_event_id(request)
        self._state.position()
        wake = asyncio.Event()
        subscriber = self._feed.subscribe(after, wake.set)
        await request.open_stream(NO_STORE)
        if subscriber is None:
            await request.close_stream(self._feed.reset_frame())
            return
        self._wakes.add(wake.set)
        self._publisher.keep_alive()
        drops = self._drops
        try:
            while not self._closed and drops == self._drops:
                frames = subscriber.take()
                if subscriber.overrun:
                    await request.close_stream(self._feed.reset_frame())
                    return
                if frames:
                    await request.write(frames)
                else:
                    wake.clear()
                    await wake.wait()
            await request.close_stream()
        finally:
            self._wakes.discard(wake.set)
            self._feed.unsubscribe(subscriber)

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, self._closed)


def _last_event_id(request: HttpRequest) -> tuple[int, int] | None:
    text = request.header(b"last-event-id")
    if not text:
        return None
    try:
        return decode_position(text)
    except FeedError as error:
        raise ApiError(400, str(error), param="last-event-id") from None
