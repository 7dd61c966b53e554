"""HTTP requests to workers, behind one narrow interface: bytes in, bytes out, nothing interpreted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

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


class Progress(StrEnum):
    """How far an exchange got before it failed: what may have happened at the worker."""

    UNSENT = "unsent"
    """The worker cannot have acted on it: nothing was sent, or the connection was closed with the request unread."""
    UNANSWERED = "unanswered"
    """The request was sent, in part at least, and no byte of an answer came: the worker may have acted on it."""
    ANSWERING = "answering"
    """The answer had begun."""


class UpstreamError(Exception):
    """A worker's answer is missing or incomplete; `progress` says how far the exchange had got."""

    def __init__(self, cause: Cause, message: str, progress: Progress = Progress.UNANSWERED) -> None:
        super().__init__(message)
        self.cause = cause
        self.progress = progress


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """What goes to whichever worker is chosen; `target` is the path with its query, as the client sent it."""

    method: str
    target: str
    headers: Headers
    body: bytes
    repeatable: bool = False
    """Sending it twice has no other effect than sending it once (`server.paths`)."""


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
    """Sends requests to workers (`server.pool`)."""

    async def send(self, url: str, request: UpstreamRequest) -> UpstreamResponse:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`."""

    def forget(self, url: str) -> None:
        """The worker is gone: idle connections to it are closed."""

    async def close(self) -> None:
        """Cut every connection."""
