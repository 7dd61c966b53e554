"""`Upstream` on httptools: a pool of keep-alive connections to workers that costs a few microseconds a request.

General HTTP clients cost 200 us (aiohttp) to 3,000 us (httpx) of CPU a request, which a router would add to every
request. The pool leaves out what a proxy does not want: redirects, cookies, decompression, and all retries but one
(`ConnectionPool.send`).
"""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from kvcache.ranks import RANK_HEADER, split_rank
from router.core.retries import FailureCause, Progress
from router.upstream.connection import ConnectionState, WorkerConnection
from router.upstream.interface import UpstreamError, UpstreamRequest
from runtime.inline import within_task

STALE_WITHIN = 1.0
"""Seconds. A worker that closes an idle connection while a request is on its way does so within one round trip. A
worker that closes later than this closes because of the request."""


class _Origin:
    """An address of workers (the ranks of one process) and the connections to it. The idle connection that was used
    last is the last of `idle`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.ssl else 80)
        self.host_header = parts.netloc.encode()
        self.idle: list[WorkerConnection] = []
        self.connections: set[WorkerConnection] = set()
        self.removed = False

    def new_connection(self) -> WorkerConnection:
        connection = WorkerConnection(self._released, self._closed)
        self.connections.add(connection)
        return connection

    def remove(self) -> None:
        self.removed = True
        for connection in list(self.idle):
            connection.abort()

    def _released(self, connection: WorkerConnection) -> None:
        if self.removed:
            connection.abort()
        else:
            self.idle.append(connection)

    def _closed(self, connection: WorkerConnection) -> None:
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)


class ConnectionPool:
    """Connections to workers. There are as many as requests in flight, and the data port's limit bounds those.

    An idle connection is not used again after `keep_alive` seconds. `keep_alive` must be shorter than the workers' own
    keep-alive timeout (vLLM: 5 s), or requests are sent on connections that the worker is closing.
    """

    def __init__(self, *, connect_timeout: float, keep_alive: float = 4.0) -> None:
        self._connect_timeout = connect_timeout
        self._keep_alive = keep_alive
        self._origins: dict[str, _Origin] = {}
        self._removed: list[_Origin] = []

    async def send(self, url: str, request: UpstreamRequest) -> WorkerConnection:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`.

        When a connection that was used before is closed before any byte of the answer, the request is sent once more,
        to the same worker on a new connection (RFC 9112 9.3.1): the worker closed the old one because it was idle. This
        takes either proof that the worker never read the request, or a request that may be sent twice (RFC 9110 9.2.2).
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._open_origin(url)
        connection = self._take_idle(origin)
        if connection is None:
            return await self._send_on(await self._connect(origin), origin, request)
        try:
            return await self._send_on(connection, origin, request)
        except UpstreamError as error:
            if origin.removed or not _was_stale(connection, request, error):
                raise
            first_progress = error.progress
        try:
            return await self._send_on(await self._connect(origin), origin, request)
        except UpstreamError as error:
            if first_progress is Progress.UNANSWERED and error.progress is Progress.UNSENT:
                error.progress = first_progress  # the worker may have read the request when it was sent first
            raise

    def remove(self, url: str) -> None:
        """Close the idle connections to a worker that has been removed, unless another rank uses them too. Those in use
        are closed when they are free."""
        origin = self._origins.pop(url, None)
        if origin is not None and origin not in self._origins.values():
            origin.remove()
            self._removed = [old for old in (*self._removed, origin) if old.connections]

    async def close(self) -> None:
        """Abort every connection."""
        origins = {*self._removed, *self._origins.values()}
        connections = [connection for origin in origins for connection in origin.connections]
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.closed.wait() for connection in connections))

    def _open_origin(self, url: str) -> _Origin:
        """That of another rank at the same address, or a new one."""
        address, _ = split_rank(url)
        known = (origin for other, origin in self._origins.items() if split_rank(other)[0] == address)
        origin = self._origins[url] = next(known, None) or _Origin(address)
        return origin

    async def _send_on(
        self, connection: WorkerConnection, origin: _Origin, request: UpstreamRequest
    ) -> WorkerConnection:
        try:
            head = _head(request, origin.host_header)
            await connection.send(head, request.body, bodiless=request.method == "HEAD")
        except BaseException:
            connection.abort()
            raise
        return connection

    def _take_idle(self, origin: _Origin) -> WorkerConnection | None:
        oldest = asyncio.get_running_loop().time() - self._keep_alive
        while origin.idle:
            connection = origin.idle.pop()
            if connection.state is ConnectionState.IDLE and connection.since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: _Origin) -> WorkerConnection:
        """A new connection. A failed one is discarded here: its `connection_lost` is never called."""
        connection = origin.new_connection()
        try:
            await self._open(connection, origin)
        except BaseException:
            origin.connections.discard(connection)
            raise
        return connection

    async def _open(self, connection: WorkerConnection, origin: _Origin) -> None:
        await within_task()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_connection(lambda: connection, origin.host, origin.port, ssl=origin.ssl)
        except ConnectionRefusedError as error:
            raise UpstreamError(FailureCause.REFUSED, str(error), Progress.UNSENT) from None
        except TimeoutError:
            message = f"no connection within {self._connect_timeout:g} s"
            raise UpstreamError(FailureCause.CONNECT, message, Progress.UNSENT) from None
        except OSError as error:
            raise UpstreamError(FailureCause.CONNECT, str(error), Progress.UNSENT) from None


def _was_stale(connection: WorkerConnection, request: UpstreamRequest, error: UpstreamError) -> bool:
    """Whether the worker closed the connection because it had been idle, not because of the request."""
    if error.cause is not FailureCause.BROKEN:
        return False
    if error.progress is Progress.UNANSWERED and request.repeatable:
        return asyncio.get_running_loop().time() - connection.since < STALE_WITHIN
    return error.progress is Progress.UNSENT


def _head(request: UpstreamRequest, host: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (request.method.encode(), request.target.encode(), host)]
    lines += [b"%s: %s\r\n" % header for header in request.headers]
    if request.rank is not None:
        lines.append(b"%s: %d\r\n" % (RANK_HEADER.encode(), request.rank))
    if request.body or request.method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        lines.append(b"content-length: %d\r\n" % len(request.body))
    lines.append(b"\r\n")
    return b"".join(lines)
