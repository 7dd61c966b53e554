"""`Upstream` on httptools: keep-alive connections to workers, a few microseconds a request.

General HTTP clients cost 200 us (aiohttp) to 3,000 us (httpx) of CPU a request; a router pays that for everyone. What
is left out is what a proxy does not want: redirects, cookies, decompression, and retries but for one: see
`HttpToolsUpstream.send`.
"""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from router.upstream.connection import Link, LinkState
from router.upstream.interface import Cause, Progress, UpstreamError, UpstreamRequest

STALE_WITHIN = 1.0
"""Seconds. A worker that closes an idle connection while a request is on its way does so within a round trip; later
than this it closed because of the request."""


class _Origin:
    """One worker's address and its idle connections, the one used last at the end."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.ssl else 80)
        self.host_header = parts.netloc.encode()
        self.idle: list[Link] = []
        self.links: set[Link] = set()
        self.forgotten = False

    def link(self) -> Link:
        link = Link(self._free, self._gone)
        self.links.add(link)
        return link

    def forget(self) -> None:
        self.forgotten = True
        for link in list(self.idle):
            link.abort()

    def _free(self, link: Link) -> None:
        if self.forgotten:
            link.abort()
        else:
            self.idle.append(link)

    def _gone(self, link: Link) -> None:
        self.links.discard(link)
        if link in self.idle:
            self.idle.remove(link)


class HttpToolsUpstream:
    """Connections to workers, as many as there are requests in flight: what bounds them is the data port's limit.

    An idle connection is not used again after `keep_alive` seconds: keep it below the workers' own limit (vLLM: 5 s),
    or requests go out on connections that the worker is closing.
    """

    def __init__(self, *, connect_timeout: float, keep_alive: float = 4.0) -> None:
        self._connect_timeout = connect_timeout
        self._keep_alive = keep_alive
        self._origins: dict[str, _Origin] = {}
        self._forgotten: list[_Origin] = []

    async def send(self, url: str, request: UpstreamRequest) -> Link:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`.

        A connection that was used before and is closed before any byte of the answer is replaced by a new one to the
        same worker, once (RFC 9112 9.3.1): the worker closed it because it was idle. That takes proof that it never
        read the request, or a request that may be sent twice (RFC 9110 9.2.2).
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = _Origin(url)
        link = self._take_idle(origin)
        if link is None:
            return await self._exchange(await self._connect(origin), origin, request)
        try:
            return await self._exchange(link, origin, request)
        except UpstreamError as error:
            if origin.forgotten or not _was_stale(link, request, error):
                raise
            stale = error.progress
        try:
            return await self._exchange(await self._connect(origin), origin, request)
        except UpstreamError as error:
            if stale is Progress.UNANSWERED and error.progress is Progress.UNSENT:
                error.progress = stale  # what is not known of the first time is not known of both
            raise

    def forget(self, url: str) -> None:
        """The worker is gone: close its idle connections."""
        origin = self._origins.pop(url, None)
        if origin is not None:
            origin.forget()
            self._forgotten = [old for old in (*self._forgotten, origin) if old.links]

    async def close(self) -> None:
        """Cut every connection."""
        links = [link for origin in (*self._forgotten, *self._origins.values()) for link in origin.links]
        for link in links:
            link.abort()
        await asyncio.gather(*(link.lost.wait() for link in links))

    async def _exchange(self, link: Link, origin: _Origin, request: UpstreamRequest) -> Link:
        try:
            await link.exchange(_head(request, origin.host_header), request.body, bodiless=request.method == "HEAD")
        except BaseException:
            link.abort()
            raise
        return link

    def _take_idle(self, origin: _Origin) -> Link | None:
        oldest = asyncio.get_running_loop().time() - self._keep_alive
        while origin.idle:
            link = origin.idle.pop()
            if link.state is LinkState.IDLE and link.since > oldest:
                return link
            link.abort()
        return None

    async def _connect(self, origin: _Origin) -> Link:
        """A new connection. One that cannot be made is forgotten here: nobody is told when it is gone."""
        link = origin.link()
        try:
            await self._make(link, origin)
        except BaseException:
            origin.links.discard(link)
            raise
        return link

    async def _make(self, link: Link, origin: _Origin) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_connection(lambda: link, origin.host, origin.port, ssl=origin.ssl)
        except ConnectionRefusedError as error:
            raise UpstreamError(Cause.REFUSED, str(error), Progress.UNSENT) from None
        except TimeoutError:
            message = f"no connection within {self._connect_timeout:g} s"
            raise UpstreamError(Cause.CONNECT, message, Progress.UNSENT) from None
        except OSError as error:
            raise UpstreamError(Cause.CONNECT, str(error), Progress.UNSENT) from None


def _was_stale(link: Link, request: UpstreamRequest, error: UpstreamError) -> bool:
    if error.cause is not Cause.BROKEN:
        return False
    if error.progress is Progress.UNANSWERED and request.repeatable:
        return asyncio.get_running_loop().time() - link.since < STALE_WITHIN
    return error.progress is Progress.UNSENT


def _head(request: UpstreamRequest, host: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (request.method.encode(), request.target.encode(), host)]
    lines += [b"%s: %s\r\n" % header for header in request.headers]
    if request.body or request.method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        lines.append(b"content-length: %d\r\n" % len(request.body))
    lines.append(b"\r\n")
    return b"".join(lines)
