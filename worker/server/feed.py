"""GET /cache/state and GET /cache/events: the cache feed, as `kvcache.feed` defines it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvcache.errors import ApiError
from kvcache.feed import (
    JSON,
    MSGPACK,
    FeedError,
    Load,
    Snapshot,
    WorkerInfo,
    decode_position,
    encode_snapshot,
)
from worker.feed import FeedLog
from worker.reporter import Reporter
from worker.runner import EngineRunner
from worker.server.http import Exchange, Header
from worker.server.service import Service

NO_STORE: Header = (b"cache-control", b"no-store")


class CacheState:
    """Snapshots of the engine's cache that agree with the feed's position."""

    def __init__(self, info: WorkerInfo, runner: EngineRunner, feed: FeedLog) -> None:
        self.info = info
        self._runner = runner
        self._feed = feed

    def position(self) -> str:
        """`epoch:seq` with everything published that has happened so far."""
        self._runner.flush()
        return self._feed.position

    def load(self) -> Load:
        """What the engine is busy with now."""
        return self._runner.engine.load()

    def snapshot(self) -> Snapshot:
        """The whole cache: O(blocks)."""
        self._runner.flush()
        engine = self._runner.engine
        return Snapshot(self.info, self._feed.seq, engine.load(), tuple(engine.blocks()))


class FeedEndpoints:
    """Both endpoints. `close` ends every stream."""

    def __init__(self, state: CacheState, feed: FeedLog, reporter: Reporter) -> None:
        self._state = state
        self._feed = feed
        self._reporter = reporter
        self._wakes: set[Callable[[], None]] = set()
        self._closed = False

    def close(self) -> None:
        """End every stream, and answer 503 from now on."""
        self._closed = True
        for wake in tuple(self._wakes):
            wake()

    async def state(self, exchange: Exchange, service: Service) -> None:
        """The snapshot; 304 when If-None-Match names the present position."""
        self._check_open()
        etag = f'"{self._state.position()}"'.encode()
        known = exchange.header(b"if-none-match").encode("latin-1")
        if etag in (tag.strip().removeprefix(b"W/") for tag in known.split(b",")):
            await exchange.reply(304, b"", (b"etag", etag))
            return
        media_type = MSGPACK if MSGPACK in exchange.header(b"accept") else JSON
        body = encode_snapshot(self._state.snapshot(), media_type)
        await exchange.reply(200, body, (b"content-type", media_type.encode()), (b"etag", etag), NO_STORE)

    async def events(self, exchange: Exchange, service: Service) -> None:
        """The stream: what the subscriber missed since Last-Event-ID, then everything as it happens.

        A position that cannot be resumed, or a subscriber too slow to keep, ends the stream with a `reset` event.
        """
        self._check_open()
        after = _last_event_id(exchange)
        self._state.position()
        wake = asyncio.Event()
        subscriber = self._feed.subscribe(after, wake.set)
        await exchange.open_stream(NO_STORE)
        if subscriber is None:
            await exchange.close_stream(self._feed.reset_frame())
            return
        self._wakes.add(wake.set)
        self._reporter.keep_alive()
        try:
            while not self._closed:
                frames = subscriber.take()
                if subscriber.overrun:
                    await exchange.close_stream(self._feed.reset_frame())
                    return
                if frames:
                    await exchange.write(frames)
                else:
                    wake.clear()
                    await wake.wait()
            await exchange.close_stream()
        finally:
            self._wakes.discard(wake.set)
            self._feed.unsubscribe(subscriber)

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "The worker is shutting down; its cache is of no more use.")


def _last_event_id(exchange: Exchange) -> tuple[int, int] | None:
    text = exchange.header(b"last-event-id")
    if not text:
        return None
    try:
        return decode_position(text)
    except FeedError as error:
        raise ApiError(400, str(error), param="last-event-id") from None
