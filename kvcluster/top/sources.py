"""Where the live document comes from: a router's management port, directly or through a Kubernetes API server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx

from router.live.document import DocumentError, Live, decode
from router.live.updates import applied, decode_update
from runtime.sse import EventTooLargeError, SseReader

SILENCE = 15.0
"""Seconds without a byte after which a stream counts as dead: a router writes something at least every 5 s."""
TIMEOUT = 10.0
"""Seconds for an answer to begin."""
MAX_BYTES = 64 << 20
"""A document of more bytes is refused; with 500 workers it takes less than half a MB."""


class SourceError(RuntimeError):
    """The live document cannot be read. The message says why, and what to do if that is known."""


class Source(Protocol):
    """Bytes of the two endpoints of the live document."""

    @property
    def title(self) -> str:
        """What is looked at, for people."""

    def open(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The body of the answer to `GET path` in pieces, as they come. Raises `SourceError`, at any piece."""


async def document(source: Source) -> Live:
    """The document as of now. Raises `SourceError`."""
    body = bytearray()
    async with source.open("/live") as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > MAX_BYTES:
                raise SourceError(f"{source.title} sent a document of more than {MAX_BYTES >> 20} MiB")
    try:
        return decode(bytes(body))
    except DocumentError as error:
        raise _foreign(source, error) from None


async def documents(source: Source) -> AsyncGenerator[Live]:
    """The document as of now, and then whenever it changes, until the stream ends. Raises `SourceError`."""
    reader, known = SseReader(MAX_BYTES), None
    async with source.open("/live/events") as pieces:
        async for piece in pieces:
            try:
                for event in reader.feed(piece):
                    if event.name == "live":
                        known = decode(event.data)
                    elif event.name == "update" and known is not None:
                        known = applied(known, decode_update(event.data))
                    else:
                        continue
                    yield known
            except (DocumentError, EventTooLargeError) as error:
                raise _foreign(source, error) from None
    if known is None:
        raise SourceError(f"{source.title} sends no live document: is it the management port of a router?")


def _foreign(source: Source, error: Exception) -> SourceError:
    return SourceError(f"{source.title}: {error}: is it a router of another version?")


def refused(where: str, status: int) -> str:
    """What an answer of this status means."""
    if status == 404:
        return f"{where} answered 404: it is no management port of a router, or that router has no live document"
    return f"{where} answered {status}"


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A router's management URL."""

    url: str
    client: httpx.AsyncClient

    @property
    def title(self) -> str:
        """The URL."""
        return self.url

    @asynccontextmanager
    async def open(self, path: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """See `Source`."""
        timeout = httpx.Timeout(TIMEOUT, read=SILENCE)
        try:
            async with self.client.stream("GET", self.url + path, timeout=timeout) as answer:
                if answer.status_code != 200:
                    said = (await answer.aread())[:500].decode("utf-8", "replace") if answer.status_code == 503 else ""
                    raise SourceError(f"{refused(self.url + path, answer.status_code)} {said}".rstrip())
                yield answer.aiter_bytes()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"{self.url} cannot be read: {str(error) or repr(error)}") from None
