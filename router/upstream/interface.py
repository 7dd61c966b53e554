"""HTTP requests to workers behind a narrow interface: bytes in, bytes out, and nothing is interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from router.core.retries import FailureCause, Progress
from runtime.http.context import Headers

Sink = Callable[[bytes], bool]
"""Takes a piece of an answer. Returns whether it takes the next one at once."""


class UpstreamError(Exception):
    """A worker's answer is missing or incomplete. `progress` says how far the request had got."""

    def __init__(self, cause: FailureCause, message: str, progress: Progress = Progress.UNANSWERED) -> None:
        super().__init__(message)
        self.cause = cause
        self.progress = progress


@dataclass(slots=True)
class UpstreamRequest:
    """What is sent to the chosen worker. `target` is the path with its query, percent-encoded."""

    method: str
    target: str
    headers: Headers
    body: bytes
    repeatable: bool = False
    """Sending the request twice has the same effect as sending it once (`server.paths`)."""
    rank: int | None = None
    """Data-parallel rank that the request names; None: none, because the worker's process has only one."""

    def drop_body(self) -> None:
        """Free the body of a request that will not be sent again: an answer may take minutes, a body megabytes."""
        self.body = b""


class UpstreamResponse(Protocol):
    """A worker's answer whose headers have arrived."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    async def read(self) -> bytes:
        """The next piece of the body as it arrives; empty at its end. Raises `UpstreamError`."""

    async def pass_on(self, sink: Sink) -> bool:
        """Hand the pieces of the body to `sink` as they arrive, as long as it takes them. Returns whether that was all.
        Raises `UpstreamError`, and what `sink` raises."""

    def close(self) -> None:
        """Return the connection to the pool if the answer is complete; otherwise close it, which cancels the request
        at the worker. Idempotent."""


class Upstream(Protocol):
    """Sends requests to workers. `upstream.pool` implements it."""

    async def send(self, url: str, request: UpstreamRequest) -> UpstreamResponse:
        """Send `request` to the worker at `url` and wait for the answer's headers. Raises `UpstreamError`.

        The ranks of one process (`kvcache.ranks`) share its address and so its connections.
        """

    def remove(self, url: str) -> None:
        """Close the idle connections to a worker that has been removed, unless another rank uses them too."""

    async def close(self) -> None:
        """Abort every connection."""
