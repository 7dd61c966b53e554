"""Answers with server-sent events (WHATWG HTML, 9.2), which last as long as their client reads.

Who sends nothing else sends `KEEP_ALIVE` every `KEEP_ALIVE_INTERVAL` seconds, so that a reader can tell a quiet stream
from a dead one, and the server notices a client that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvcache.errors import error_body

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers pass over."""
KEEP_ALIVE_INTERVAL = 5.0
"""Seconds without an event after which it is sent."""
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
"""The last one lets nginx pass events on as they come."""


class StreamLimit:
    """So many streams are open at one time, at most. `refusal` tells one more client what to do."""

    def __init__(self, most: int, refusal: str) -> None:
        self.most = most
        self.refusal = refusal
        self.open = 0

    @contextlib.contextmanager
    def accepted(self) -> Iterator[None]:
        """Count a stream from its acceptance, before anything is awaited, to its end."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


class EventStream(Response):
    """The events, each with its empty line, until they end or the client leaves; 503 if `limit` allows no more."""

    def __init__(self, events: AsyncGenerator[bytes], limit: StreamLimit) -> None:
        super().__init__()
        self._events = events
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if self._limit.open >= self._limit.most:
            body = orjson.dumps(error_body(self._limit.refusal, "ServiceUnavailableError", None, 503))
            await Response(body, 503, media_type="application/json")(scope, receive, send)
            return
        with self._limit.accepted(), contextlib.suppress(OSError):  # the client left
            async with _while_connected(receive), contextlib.aclosing(self._events) as events:
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncGenerator[None]:
    """Ends what is in it with `TimeoutError` (an `OSError`) when the client leaves."""
    async with asyncio.timeout(None) as until:

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            until.reschedule(asyncio.get_running_loop().time())

        leaving = asyncio.create_task(leave())
        try:
            yield
        finally:
            leaving.cancel()


async def set_within(event: asyncio.Event, seconds: float = KEEP_ALIVE_INTERVAL) -> bool:
    """Wait for `event`. Returns whether it was set in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
        return True
    return False
