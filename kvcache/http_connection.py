"""One HTTP/1.1 connection and the requests on it, each with a bound on what the client may hold.

Built on uvicorn's httptools protocol; `kvcache.serving` is the door.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Literal, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from kvcache.http_cycle import Cycle, Refusal
from kvcache.logs import event

logger = logging.getLogger(__name__)

LAME_DUCK = 0.25
"""Seconds an idle connection stays open at shutdown, so that a request already on its way is answered; and for as long
after the last request that came on any of them: a client that goes on sending takes its idle connections one by one,
and each is told `Connection: close`."""
LINGER = 2.0
"""Seconds a refused connection is still read (and thrown away): closing it with unread bytes would reset it, and
the client might never see the answer that says why."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may hold. Bytes and seconds."""

    max_header_bytes: int = 65_536
    max_headers: int = 256
    max_body_bytes: int = 16 * 2**20
    header_timeout: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_timeout: float = 30.0
    """Longest silence while a body arrives."""
    write_timeout: float = 30.0
    """Longest time a client may leave a full send buffer unread."""
    keep_alive: float = 75.0
    """How long a connection may be idle between requests, or before its first."""
    max_concurrent_requests: int | None = None
    """Requests between the end of their headers and the end of their answer; None = no bound."""


class ServingState(ServerState):
    """What the connections of one server share."""

    connections: set[Connection]  # type: ignore[assignment]

    def __init__(self, limits: HttpLimits, cancel_on_disconnect: bool, on_refusal: Callable[[int], None]) -> None:
        super().__init__()
        self.limits = limits
        self.cancel_on_disconnect = cancel_on_disconnect
        self.on_refusal = on_refusal
        self.in_flight = 0
        self.draining = False
        """Every answer whose head has not gone out says `Connection: close`."""
        self.stopping = False
        """No new connection is accepted."""
        self.arrived_at = 0.0
        """Loop time of the last request that came while stopping."""
        self.changed = asyncio.Event()
        """Set when a connection goes away: `HttpServer.stop` looks again."""
        self._second = 0

    def date_headers(self) -> list[tuple[bytes, bytes]]:
        """`date` and `server`; renewed when a second has passed, never by a timer."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self.default_headers = [(b"date", formatdate(now, usegmt=True).encode()), (b"server", b"uvicorn")]
        return self.default_headers


class Connection(HttpToolsProtocol):
    """One client connection.

    `_stage` is where the request being read stands: "idle" (no byte of it has come; timer: `keep_alive`, unless an
    answer is under way), "headers" (timer: `header_timeout`), "body" (timer: `body_timeout`). One timer serves all
    three. `cycle` is the request being answered, `pipeline` holds those that arrived meanwhile.
    """

    server_state: ServingState
    cycle: Cycle | None  # type: ignore[assignment]
    pipeline: deque[Cycle]  # type: ignore[assignment]

    def __init__(self, config: Config, state: ServingState, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config=config, server_state=state, app_state={}, _loop=loop)
        self.access_log = False
        self._limits = state.limits
        self._stage: Literal["idle", "headers", "body"] = "idle"
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal: Refusal | None = None
        self._discarding = False
        self._counted = 0
        self._body: list[bytes] = []
        self._header_bytes = self._body_bytes = 0
        self._keep_alive = True
        self._idle_since = 0.0
        """Loop time; 0: since before the server began to stop."""

    # --- transport ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        self.server = get_local_addr(transport)
        self.client = get_remote_addr(transport)
        self.scheme = "http"
        self._set_timer(self._limits.keep_alive, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        state, cycle = self.server_state, self.cycle
        state.connections.discard(self)
        self._release(self._counted)
        self._set_timer(None)
        self.pipeline.clear()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if state.cancel_on_disconnect and cycle.task is not None:
                cycle.task.cancel("the client disconnected")
        self.resume_writing()
        self.parser = None  # it refers to this protocol
        state.changed.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._guard_writing()

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _guard_writing(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout, self._unread)

    def _unread(self) -> None:
        event(logger, logging.INFO, "client_dropped", why="it does not read its answer", client=str(self.client))
        self.transport.abort()

    def _set_timer(self, delay: float | None, then: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(delay, then) if delay is not None and then is not None else None

    def _close(self) -> None:
        """Close once the client has read what was written, or after `write_timeout`."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._guard_writing()

    def _release(self, requests: int) -> None:
        self._counted -= requests
        self.server_state.in_flight -= requests

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        stage = self._stage
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal or Refusal(400, "Invalid HTTP request received."))
            return
        if self._stage == "headers":
            if stage != "headers":
                self._set_timer(self._limits.header_timeout, self._silent)
                return
            # The parser keeps an unfinished header to itself, so what arrives is counted here too.
            self._header_bytes += len(data)
            if self._header_bytes > 2 * self._limits.max_header_bytes:
                self._refuse(self._headers_too_large())
        elif self._stage == "body":
            self._set_timer(self._limits.body_timeout, self._silent)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Serve as HTTP/1.1 a request that offers another protocol (h2c, WebSocket), as RFC 9110 7.8 allows.

        The parser takes what follows such a head for the other protocol, and so would lose the body (Java's HTTP client
        offers h2c with every POST): read the request again without its offer.
        """
        self.parser = httptools.HttpRequestParser(self)
        offer = (b"connection", b"upgrade", b"http2-settings")
        head = b"%s %s HTTP/1.1\r\n" % (self.scope["method"].encode(), self.url)
        fields = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] not in offer)
        self.parser.feed_data(head + fields + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._set_timer(None)
        self._stage = "headers"
        self._header_bytes = self._body_bytes = 0
        self._body = []

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        if len(self.headers) >= self._limits.max_headers:
            raise self._refused(
                Refusal(431, f"The request has more than {self._limits.max_headers} headers.", "RequestHeadersTooLarge")
            )
        name = name.lower()
        self.headers.append((name, value))
        if name == b"content-length" and int(value) > self._limits.max_body_bytes:
            self._body_bytes = int(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        state, limits = self.server_state, self._limits
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
            return  # see _decline_upgrade
        if self._body_bytes > limits.max_body_bytes:
            raise self._refused(self._body_too_large())
        if limits.max_concurrent_requests is not None and state.in_flight >= limits.max_concurrent_requests:
            message = f"The server is busy with {state.in_flight} requests, which is its limit."
            raise self._refused(Refusal(503, message, "ServiceUnavailableError", retry_after=1))
        parsed = httptools.parse_url(self.url)
        raw_path = parsed.path or b"/"
        path = raw_path.decode("ascii")
        version = self.parser.get_http_version()
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = parsed.query or b""
        self._keep_alive = version != "1.0" and self.parser.should_keep_alive()
        self._stage = "body"
        self._set_timer(None)
        self._counted += 1
        state.in_flight += 1
        if self.expect_100_continue and self.cycle is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._refused(self._body_too_large())
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._stage != "body":
            return  # see _decline_upgrade
        self._stage = "idle"
        self._set_timer(None)
        state = self.server_state
        if state.stopping:
            state.arrived_at = self.loop.time()
        cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=state.date_headers(),
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=self._keep_alive and not state.draining,
            on_response=self.on_response_complete,
        )
        cycle.body = b"".join(self._body)  # type: ignore[assignment]
        self._body = []
        if self.cycle is None:
            self._start(cycle)
        else:
            self.flow.pause_reading()
            self.pipeline.append(cycle)

    # --- answering ---

    def _start(self, cycle: Cycle) -> None:
        self.cycle = cycle
        cycle.task = task = self.loop.create_task(cycle.run_asgi(cast(ASGIApp, self.app)))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        self.cycle = None
        self.server_state.total_requests += 1
        self._release(1)
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size():
                self._guard_writing()
        elif self.pipeline:
            self._start(self.pipeline.popleft())
        else:
            self.flow.resume_reading()
            if self.server_state.stopping:
                self._idle_since = self.loop.time()
            if self._stage == "idle":
                self._set_timer(self._limits.keep_alive, self._close)

    # --- refusing ---

    def _refused(self, refusal: Refusal) -> Refusal:
        self._refusal = refusal
        return refusal

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.max_header_bytes:
            raise self._refused(self._headers_too_large())

    def _headers_too_large(self) -> Refusal:
        message = f"The request's headers take more than {self._limits.max_header_bytes} bytes."
        return Refusal(431, message, "RequestHeadersTooLarge")

    def _body_too_large(self) -> Refusal:
        message = f"The request's body takes more than {self._limits.max_body_bytes} bytes."
        return Refusal(413, message, "RequestEntityTooLarge")

    def _silent(self) -> None:
        self._refuse(Refusal(408, f"The request's {self._stage} did not arrive in time.", "RequestTimeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what cannot be served, then read and discard for a while before closing."""
        self._discarding = True
        if self._stage == "body":
            self._release(1)
        self._body = []
        self.server_state.on_refusal(refusal.status)
        if self.cycle is not None:  # the answer under way is finished; nothing may be written into it
            self._release(len(self.pipeline))
            self.pipeline.clear()
            self.cycle.keep_alive = False
            return
        self.transport.write(refusal.raw(self.server_state.date_headers()))
        self.transport.write_eof()
        self._set_timer(LINGER, self.transport.abort)

    # --- stopping ---

    def drain(self) -> None:
        """Let the last answer that has been asked for say `Connection: close`, unless its head is out."""
        last = self.pipeline[-1] if self.pipeline else self.cycle
        if last is not None and not last.response_started:
            last.keep_alive = False

    def close_if_idle(self, since: float) -> None:
        """Close without a word, if it has been idle since this loop time or longer."""
        if self.cycle is None and self._stage == "idle" and self._idle_since <= since:
            self._close()
