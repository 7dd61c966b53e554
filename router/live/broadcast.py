"""Server-sent events for everyone who looks at the live document: it is made once a second for all of them together,
and not at all while nobody looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import orjson

from router.live.document import Live, encode
from router.live.updates import difference
from runtime.http.event_stream import KEEP_ALIVE, set_within
from runtime.logs import EventLogger

logger = EventLogger(__name__)

INTERVAL = 1.0
"""Seconds between two updates, at least."""
RETRY = b"retry: 2000\n\n"
"""Milliseconds after which a browser connects again."""


class Broadcast:
    """One stream of events for each viewer.

    Nothing is queued for a viewer: one that reads more slowly than updates are made gets the next update if it missed
    none, and a whole document if it did. One that does not read at all is dropped by the HTTP server.
    """

    def __init__(self, document: Callable[[], Awaitable[Live]], interval: float = INTERVAL) -> None:
        self._document = document
        self._interval = interval
        self._latest: Live | None = None
        self._number = 0
        """Of the latest document."""
        self._update = b""
        """The event that leads to it from the one before."""
        self._whole: bytes | None = None
        """The event with all of it, once somebody needs that."""
        self._changed = asyncio.Event()
        """Set when there is another document than when it was made, or none any more."""
        self._making: asyncio.Task[None] | None = None
        self._closed = False
        self.viewers = 0

    def close(self) -> None:
        """End every stream, and those that begin from now on."""
        self._closed = True
        self._stop()

    async def events(self) -> AsyncGenerator[bytes]:
        """The events for one more viewer."""
        self.viewers += 1
        try:
            yield RETRY
            if self._closed:
                return
            if self._making is None:
                self._making = asyncio.create_task(self._make())
            making, seen = self._making, -1
            while not making.done():
                if self._latest is not None and self._number != seen:
                    event = self._update if self._number == seen + 1 else self._document_event(self._latest)
                    seen = self._number
                    yield event
                elif not await set_within(self._changed):
                    yield KEEP_ALIVE
        finally:
            self.viewers -= 1
            if not self.viewers:
                self._stop()

    async def _make(self) -> None:
        """Make documents until somebody cancels this. If one cannot be made, the streams end."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                document = await self._document()
                if self._latest is not None:
                    self._update = _event(b"update", orjson.dumps(difference(self._latest, document)))
                self._latest, self._whole = document, None
                self._number += 1
                self._tell()
                await asyncio.sleep(max(self._interval - (loop.time() - began), self._interval / 10))
        except Exception:
            logger.exception("live_document_failed")
            self._making = self._latest = None
        finally:
            asyncio.get_running_loop().call_soon(self._tell)  # once this task is done

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _document_event(self, document: Live) -> bytes:
        if self._whole is None:
            self._whole = _event(b"live", encode(document))
        return self._whole

    def _stop(self) -> None:
        if self._making is not None:
            self._making.cancel()
        self._making = self._latest = self._whole = None


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name, data)
