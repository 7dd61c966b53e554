"""HTTP requests to workers, behind one narrow interface: bytes in, bytes out, nothing interpreted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from router.core.retries import Progress
from runtime.http.context import Headers

__all__ = ["Cause", "Progress", "Upstream", "UpstreamError", "UpstreamRequest", "UpstreamResponse"]


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
    """It answered 503 or 429: its queue is full, or it is draining."""
    DOUBTED = "doubted"
    """It refused the request (4xx), which another worker may not: see `core.retries`."""
    ERROR_EVENT = "error_event"
    """A stream whose first event is an error: the engine died."""
    ABORTED = "aborted"
    """Finish reason "abort" before any text: the engine is shutting down."""
    LEFT = "left"
    """It was taken from the list of workers before it answered."""
    STALLED = "stalled"
    """It fell silent altogether (a frozen process, a lost node), for longer than the stall time-out."""
    TIMEOUT = "timeout"
    """It lives but sent nothing for longer than the time-out allows."""


class UpstreamError(Exception):
    """A worker's answer is missing or incomplete; `progress` says how far the exchange had got."""

    def __init__(self, cause: Cause, message: str, progress: Progress = Progress.UNANSWERED) -> None:
        super().__init__(message)
        self.cause = cause
        self.progress = progress


@dataclass(slots=True)
class UpstreamRequest:
    """What goes to whichever worker is chosen; `target` is the path with its query, percent-encoded."""

    method: str
    target: str
    headers: Headers
    body: bytes
    repeatable: bool = False
    """Sending it twice has no other effect than sending it once (`server.paths`)."""

    def drop_body(self) -> None:
        """It will not be sent again: an answer may take minutes, and the body megabytes."""
        self.body = b""


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
    """Sends requests to workers (`upstream.pool`)."""

    async def send(self, url: str, request: UpstreamRequest) -> UpstreamResponse:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`."""

    def forget(self, url: str) -> None:
        """The worker is gone: idle connections to it are closed."""

    async def close(self) -> None:
        """Cut every connection."""
