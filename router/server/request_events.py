"""The lines of the access log as server-sent events on the management port: for `kvcluster record`, and for debugging.

Nothing is done for a request while nobody reads. Events are `request` (a JSON object with the fields of the access log)
and `dropped` (`{"count": n}`: so many requests were left out because the reader was too slow).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Response
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from kvcache.errors import error_body
from kvcache.keys import PrefixKeys
from router.server.access_log import Digests, fields
from router.server.record import RequestRecord
from router.server.recorder import Recorder

READERS = 8
"""Streams that are open at one time, at most."""
QUEUED_EVENTS = 1024
QUEUED_BYTES = 16 * 2**20
"""Of the token ids of prompts whose blocks are still to be digested, for each reader."""
THREAD_BYTES = 65_536
"""The blocks of a prompt with more bytes of token ids than this are digested in a thread."""
PATIENCE = 5.0
"""Seconds without a request after which a comment shows that the stream is alive."""
COMMENT = b": still here\n\n"


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
    _subscriptions: set[_Subscription] = field(default_factory=set, init=False)
    _closed: bool = field(default=False, init=False)

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
        if len(self._subscriptions) >= READERS:
            busy = f"{READERS} readers are connected to this router: end one of them"
            return JSONResponse(error_body(busy, "ServiceUnavailableError", None, 503), 503)
        subscription = _Subscription(self.digests, blocks=blocks)
        return _Stream(self._stream(subscription), subscription.close)

    async def _stream(self, subscription: _Subscription) -> AsyncGenerator[bytes]:
        if self._closed:
            return
        self._subscriptions.add(subscription)
        self.recorder.readers.append(subscription.read)
        try:
            yield COMMENT  # the reader sees that it is subscribed
            told = 0
            while not subscription.closed:
                if (taken := subscription.take()) is not None:
                    yield await self._event(*taken)
                elif subscription.dropped > told:
                    yield b'event: dropped\ndata: {"count":%d}\n\n' % (subscription.dropped - told)
                    told = subscription.dropped
                elif not await _within(subscription.arrived, PATIENCE):
                    yield COMMENT
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


class _Stream(Response):
    """An answer that lasts as long as its client reads. `close` ends the events."""

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        leaving = asyncio.create_task(self._left(receive))
        try:
            async with contextlib.aclosing(self._events):
                with contextlib.suppress(OSError):  # the client left
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    async for event in self._events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()

    async def _left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._close()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
        return True
    return False
