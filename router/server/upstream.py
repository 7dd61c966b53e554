"""HTTP requests to workers, behind one narrow interface: bytes in, bytes out, nothing interpreted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from router.server.headers import Headers


class Cause(StrEnum):
    """Why a worker gave no answer that can be passed on. Label of `kvcluster_router_retries_total`."""

    REFUSED = "refused"
    """It does not accept connections: no process listens at its address."""
    CONNECT = "connect"
    """The connection could not be made: time-out, no route, name not found."""
    BROKEN = "broken"
    """It accepted the request and closed the connection, or answered what is not HTTP."""
    STATUS_5XX = "status_5xx"
    BUSY = "busy"
    """It answered 503: its queue is full, or it is draining."""
    ERROR_EVENT = "error_event"
    """A stream whose first event is an error: the engine died."""
    ABORTED = "aborted"
    """Finish reason "abort" before any text: the engine is shutting down."""
    LEFT = "left"
    """It left the candidates (silent, or gone) before it answered."""
    TIMEOUT = "timeout"
    """It sent nothing for longer than the time-out allows."""


class UpstreamError(Exception):
    """A worker's answer is missing or incomplete."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """What goes to whichever worker is chosen; `target` is the path with its query, as the client sent it."""

    method: str
    target: str
    headers: Headers
    body: bytes


class UpstreamResponse(Protocol):
    """A worker's answer whose headers have arrived."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    async def read(self) -> bytes:
        """The next piece of the body as it arrives; empty at its end. Raises `UpstreamError`."""

    def close(self) -> None:
        """Give the connection back if the answer is complete, else close it, which cancels the request. Idempotent."""


class Upstream(Protocol):
    """Sends requests to workers."""

    async def send(self, url: str, request: UpstreamRequest) -> UpstreamResponse:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`."""

    async def close(self) -> None:
        """Close every connection."""


class AiohttpResponse:
    """`UpstreamResponse` of `AiohttpUpstream`."""

    __slots__ = ("_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers: Headers = list(response.raw_headers)

    async def read(self) -> bytes:
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(Cause.BROKEN, f"the answer broke off: {error!r}") from None

    def close(self) -> None:
        if self._content.at_eof():
            self._response.release()
        else:
            self._response.close()


class AiohttpUpstream:
    """`Upstream` on one aiohttp session.

    Idle connections are closed after `keep_alive` seconds; keep it below the workers' own (vLLM: 5 s), or requests go
    out on connections that the worker is closing. As many connections to a worker as there are requests in flight:
    what bounds them is the data port's own limit.
    """

    def __init__(self, *, connect_timeout: float, keep_alive: float = 4.0) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive, ttl_dns_cache=10),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
            auto_decompress=False,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self._urls: dict[tuple[str, str], URL] = {}

    async def send(self, url: str, request: UpstreamRequest) -> AiohttpResponse:
        headers: CIMultiDict[str] = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers
        )
        try:
            response = await self._session.request(
                request.method,
                self._url(url, request.target),
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            cause = Cause.REFUSED if isinstance(error.os_error, ConnectionRefusedError) else Cause.CONNECT
            raise UpstreamError(cause, str(error)) from None
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamError(Cause.CONNECT, str(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(Cause.BROKEN, repr(error)) from None
        return AiohttpResponse(response)

    def _url(self, base: str, target: str) -> URL:
        """Parsing a URL takes 10 us; the few that matter are kept."""
        known = self._urls.get((base, target))
        if known is None:
            known = URL(base + target, encoded=True)
            if len(self._urls) >= 1024:
                self._urls.clear()
            self._urls[base, target] = known
        return known

    async def close(self) -> None:
        await self._session.close()
