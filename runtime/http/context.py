"""What the connections of one HTTP server share: its state, the limits, and what is held against them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import KW_ONLY, dataclass, field
from email.utils import formatdate
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Scope

from runtime.connections import OpenConnections
from runtime.http.limits import HttpLimits, Refusal
from runtime.inline import Cancellable

if TYPE_CHECKING:
    from runtime.http.request import ServerRequest

Headers = list[tuple[bytes, bytes]]


class Handler(Protocol):
    """Answers requests without ASGI in between."""

    def __call__(self, request: ServerRequest, /) -> Coroutine[None, None, None]:
        """Answer a request that has come whole. Runs in an `InlineTask`."""


class ServerState(Enum):
    """How far a server has gone towards its end."""

    SERVING = "serving"
    DRAINING = "draining"
    """New connections are accepted, and every answer whose head has not gone out says `Connection: close`."""
    STOPPING = "stopping"
    """As DRAINING, but no new connection is accepted."""


class ServerEvent(Enum):
    """What a server is told to do."""

    DRAIN = "drain"
    STOP = "stop"


SERVER_TRANSITIONS: Mapping[tuple[ServerState, ServerEvent], ServerState] = {
    (ServerState.SERVING, ServerEvent.DRAIN): ServerState.DRAINING,
    (ServerState.SERVING, ServerEvent.STOP): ServerState.STOPPING,
    (ServerState.DRAINING, ServerEvent.STOP): ServerState.STOPPING,
}
"""What is not listed changes nothing: a server can be told to drain or to stop any number of times."""


class OpenConnection(Protocol):
    """A client's connection, as its server sees it."""

    def drain_requests(self) -> None:
        """Let the last answer that has been asked for say `Connection: close`, unless its head has gone out."""

    def close_if_idle(self, since: float) -> None:
        """Close without a word, if the connection has been idle since this loop time or longer."""

    def abort(self) -> None:
        """Close at once."""


@dataclass(eq=False)
class ServerContext:
    """One for each server. `in_flight` counts requests between the end of their headers and the end of their answer.

    `app` answers requests, each in a task of its own; or `handler` does, if there is one, each in an `InlineTask`."""

    app: ASGIApp | None
    limits: HttpLimits
    _: KW_ONLY
    cancel_on_disconnect: bool = False
    on_refusal: Callable[[int], None] = lambda status: None
    refusal_headers: Callable[[Headers], Headers] = lambda headers: []
    screen: Callable[[Scope], bool] = lambda scope: True
    handler: Handler | None = None
    state: ServerState = field(default=ServerState.SERVING, init=False)
    connections: OpenConnections[OpenConnection] = field(default_factory=OpenConnections, init=False)
    tasks: set[Cancellable] = field(default_factory=set, init=False)
    in_flight: int = field(default=0, init=False)
    body_bytes: int = field(default=0, init=False)
    """Of all requests in flight whose answers have not begun."""
    arrived_at: float = field(default=0.0, init=False)
    """Loop time of the last request that came while stopping."""
    task_ended: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set whenever a request is over while the server stops."""
    _second: int = field(default=0, init=False)
    _common: Headers = field(default_factory=list, init=False)

    def advance(self, event: ServerEvent) -> None:
        """The only way in which `state` changes."""
        self.state = SERVER_TRANSITIONS.get((self.state, event), self.state)

    def ended(self, task: Cancellable) -> None:
        """The task of a request is over."""
        self.tasks.discard(task)
        if self.state is ServerState.STOPPING:
            self.task_ended.set()

    def common_headers(self) -> Headers:
        """`date` and `server`; renewed when a second has passed, never by a timer."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            # vLLM's server is uvicorn and says so; a client that looks for an engine finds the same here.
            self._common = [(b"date", formatdate(now, usegmt=True).encode()), (b"server", b"uvicorn")]
        return self._common

    def check_room(self) -> None:
        """Raises `Refusal` when as many requests are in flight as may be."""
        limit = self.limits.max_concurrent_requests
        if limit is not None and self.in_flight >= limit:
            message = f"The server is busy with {self.in_flight} requests, which is its limit."
            raise Refusal(503, message, "ServiceUnavailableError", retry_after=1)

    def check_body(self, size: int, further: int) -> None:
        """`size`: bytes of one body, as announced or so far; `further`: those not in `body_bytes`. Raises `Refusal`."""
        limits = self.limits
        if size > limits.max_body_bytes:
            message = f"The request's body takes more than {limits.max_body_bytes} bytes."
            raise Refusal(413, message, "RequestEntityTooLarge")
        total = limits.max_total_body_bytes
        if total is not None and self.body_bytes + further > total:
            message = f"The bodies of all requests in progress may take {total} bytes, and this one does not fit."
            raise Refusal(503, message, "ServiceUnavailableError", retry_after=1)

    def release(self, requests: int, body_bytes: int) -> None:
        """So much less is in flight."""
        self.in_flight -= requests
        self.body_bytes -= body_bytes
