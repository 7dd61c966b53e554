"""`Upstream` on httptools: keep-alive connections to workers, a few microseconds a request.

General HTTP clients cost 200 us (aiohttp) to 3,000 us (httpx) of CPU a request; a router pays that for everyone. What
is left out is what a proxy does not want: redirects, cookies, decompression, retries.
"""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

import httptools

from router.server.headers import Headers
from router.server.upstream import Cause, Progress, UpstreamError, UpstreamRequest

MAX_HEADER_BYTES = 131_072
HIGH_WATER = 262_144
"""Bytes of an answer that wait for the client before the worker is no longer read."""


class _Link(asyncio.Protocol):
    """One connection to a worker; it is also the answer (`UpstreamResponse`) to the request it carries.

    Reusable when the answer is complete and both sides agreed to keep the connection.
    """

    def __init__(self, pool: HttpToolsUpstream, origin: _Origin) -> None:
        self._pool = pool
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self.lost = asyncio.Event()
        self._paused = False
        self._begin(head=False)

    def _begin(self, *, head: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self._is_head = head
        self._header_bytes = 0
        self._headers_done = self._complete = self._framed = False
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._keep_alive = True
        self._broken: UpstreamError | None = None
        self._released = False

    # --- the request's side ---

    async def exchange(self, data: bytes, *, head: bool) -> None:
        """Send a request's bytes and wait for the headers of its answer. Raises `UpstreamError`."""
        self._begin(head=head)
        if self._transport is None or self.lost.is_set():
            raise UpstreamError(Cause.BROKEN, "the connection was closed before the request was sent", Progress.UNSENT)
        self._transport.write(data)
        while not self._headers_done:
            await self._wait()

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end. Raises `UpstreamError`."""
        while not self._pieces:
            if self._complete:
                return b""
            await self._wait()
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._waiting_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return piece

    def close(self) -> None:
        """Back to the pool if the answer is complete, else cut the connection, which cancels the request."""
        if self._released:
            return
        self._released = True
        if self._complete and self._keep_alive and not self.lost.is_set() and not self._origin.forgotten:
            self._origin.idle.append(self)
            self.idle_since = self._loop.time()
        else:
            self.abort()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._broken is not None:
            raise self._broken
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- the connection's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # connections to workers are stream transports
        self._pool.links.add(self)

    def data_received(self, data: bytes) -> None:
        if self._released:
            self.abort()  # nothing was asked: whatever this is must not become the next answer
            return
        if not self._headers_done:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"the answer is not HTTP/1.1: {error}")
            return
        if not self._headers_done and self._header_bytes > MAX_HEADER_BYTES:
            self._break(f"the headers of the answer take more than {MAX_HEADER_BYTES} bytes")
            return
        if self._waiting_bytes > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        self._pool.links.discard(self)
        idle = self._origin.idle
        if self in idle:
            idle.remove(self)
        if self._headers_done and not self._framed and exc is None:
            self._complete = True  # an answer without a length ends with its connection
        elif not self._complete:
            self._broken = self._broken or UpstreamError(
                Cause.BROKEN,
                f"the worker closed the connection {'within' if self._headers_done else 'before'} its answer",
                self._progress(),
            )
        self._wake()

    def _break(self, why: str) -> None:
        self._broken = UpstreamError(Cause.BROKEN, why, self._progress())
        self.abort()
        self._wake()

    def _progress(self) -> Progress:
        return Progress.ANSWERING if self._header_bytes else Progress.UNANSWERED

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # 100 Continue and the like: the answer is yet to come
        self.status = status
        self._keep_alive = self._parser.should_keep_alive()
        self._framed = any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
        self._headers_done = True
        if self._is_head:
            self._complete = True  # the parser would wait for the body that the headers describe
            self._keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._is_head:
            self._pieces.append(body)
            self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._headers_done:
            self._complete = True


class _Origin:
    """One worker's address and its idle connections, the one used last at the end."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.ssl else 80)
        self.host_header = parts.netloc.encode()
        self.idle: list[_Link] = []
        self.forgotten = False


class HttpToolsUpstream:
    """Connections to workers, as many as there are requests in flight: what bounds them is the data port's limit.

    An idle connection is not used again after `keep_alive` seconds: keep it below the workers' own limit (vLLM: 5 s),
    or requests go out on connections that the worker is closing.
    """

    def __init__(self, *, connect_timeout: float, keep_alive: float = 4.0) -> None:
        self._connect_timeout = connect_timeout
        self._keep_alive = keep_alive
        self._origins: dict[str, _Origin] = {}
        self.links: set[_Link] = set()

    async def send(self, url: str, request: UpstreamRequest) -> _Link:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`."""
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = _Origin(url)
        link = self._idle(origin) or await self._connect(origin)
        try:
            await link.exchange(_encode(request, origin.host_header), head=request.method == "HEAD")
        except BaseException:
            link.abort()
            raise
        return link

    def forget(self, url: str) -> None:
        """The worker is gone: close its idle connections."""
        origin = self._origins.pop(url, None)
        if origin is not None:
            origin.forgotten = True
            for link in list(origin.idle):
                link.abort()

    async def close(self) -> None:
        """Cut every connection."""
        for link in list(self.links):
            link.abort()
        await asyncio.gather(*(link.lost.wait() for link in list(self.links)))

    def _idle(self, origin: _Origin) -> _Link | None:
        oldest = asyncio.get_running_loop().time() - self._keep_alive
        while origin.idle:
            link = origin.idle.pop()
            if link.idle_since > oldest:
                return link
            link.abort()
        return None

    async def _connect(self, origin: _Origin) -> _Link:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, link = await loop.create_connection(
                    lambda: _Link(self, origin), origin.host, origin.port, ssl=origin.ssl
                )
        except ConnectionRefusedError as error:
            raise UpstreamError(Cause.REFUSED, str(error), Progress.UNSENT) from None
        except TimeoutError:
            raise UpstreamError(
                Cause.CONNECT, f"no connection within {self._connect_timeout:g} s", Progress.UNSENT
            ) from None
        except OSError as error:
            raise UpstreamError(Cause.CONNECT, str(error), Progress.UNSENT) from None
        return link


def _encode(request: UpstreamRequest, host: bytes) -> bytes:
    parts = [b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (request.method.encode(), request.target.encode(), host)]
    parts += [b"%s: %s\r\n" % header for header in request.headers]
    if request.body or request.method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        parts.append(b"content-length: %d\r\n" % len(request.body))
    parts += [b"\r\n", request.body]
    return b"".join(parts)
