"""One connection to a worker and the answer to the request it carries: an explicit state machine on httptools."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Mapping
from enum import StrEnum

import httptools

from router.core.retries import FailureCause, Progress
from router.upstream.interface import Sink, UpstreamError
from runtime.http.context import Headers
from runtime.inline import Signal

MAX_HEADER_BYTES = 131_072
HIGH_WATER = 262_144
"""Bytes of an answer that may wait for the client before the connection is no longer read."""
SMALL_BODY = 65_536
"""Request bodies of up to this many bytes are copied behind their head and written at once. Larger ones are never
copied."""


class ConnectionState(StrEnum):
    """The state of a connection and of the request it carries. (A `StrEnum`, because its members hash in C.)"""

    IDLE = "idle"
    """No request is under way: the connection may carry the next one."""
    WAITING = "waiting"
    """A request was written, and no byte of its answer has come."""
    HEAD = "head"
    """Part of the answer's head has come, or an interim answer (1xx)."""
    BODY = "body"
    """The whole head has come; the body is read as it arrives."""
    STALLED = "stalled"
    """As BODY, but more than `HIGH_WATER` bytes wait for the client: the connection is not read."""
    COMPLETE = "complete"
    """The whole answer has come, and both sides keep the connection open."""
    CLOSED = "closed"
    """The connection is closed or being aborted. Its last answer, if any, was complete or no longer wanted."""
    BROKEN = "broken"
    """The connection is closed or being aborted, and the answer is not complete."""


class ConnectionEvent(StrEnum):
    """What happens to a connection."""

    REQUEST_SENT = "request sent"
    FIRST_BYTE = "first byte"
    """The first byte of the answer."""
    HEAD_COMPLETE = "head complete"
    ANSWER_COMPLETE = "answer complete"
    """The answer is complete, and the connection may carry another request."""
    HIGH_WATER = "high water"
    """More of the answer waits for the client than `HIGH_WATER`."""
    READ = "read"
    """The client has taken what was waiting."""
    RELEASED = "released"
    """The answer has been passed on."""
    CLOSED = "closed"
    """Either side closes the connection, and nothing of a wanted answer is missing."""
    FAILED = "failed"
    """The connection is lost, or not usable any more, before the answer is complete."""


_ENDS = {ConnectionEvent.CLOSED: ConnectionState.CLOSED, ConnectionEvent.FAILED: ConnectionState.BROKEN}
CONNECTION_TRANSITIONS: Mapping[ConnectionState, Mapping[ConnectionEvent, ConnectionState]] = {
    ConnectionState.IDLE: {
        ConnectionEvent.REQUEST_SENT: ConnectionState.WAITING,
        ConnectionEvent.CLOSED: ConnectionState.CLOSED,
    },
    ConnectionState.WAITING: {ConnectionEvent.FIRST_BYTE: ConnectionState.HEAD, **_ENDS},
    ConnectionState.HEAD: {
        ConnectionEvent.HEAD_COMPLETE: ConnectionState.BODY,
        ConnectionEvent.ANSWER_COMPLETE: ConnectionState.COMPLETE,
        **_ENDS,
    },
    ConnectionState.BODY: {
        ConnectionEvent.HIGH_WATER: ConnectionState.STALLED,
        ConnectionEvent.ANSWER_COMPLETE: ConnectionState.COMPLETE,
        **_ENDS,
    },
    ConnectionState.STALLED: {ConnectionEvent.READ: ConnectionState.BODY, **_ENDS},
    ConnectionState.COMPLETE: {
        ConnectionEvent.RELEASED: ConnectionState.IDLE,
        ConnectionEvent.CLOSED: ConnectionState.CLOSED,
    },
    ConnectionState.CLOSED: {},
    ConnectionState.BROKEN: {},
}
"""What is not listed cannot happen, and is an error."""
_ANSWERED = frozenset({ConnectionState.COMPLETE, ConnectionState.CLOSED})
_BEFORE_BODY = frozenset({ConnectionState.WAITING, ConnectionState.HEAD})
_OVER = frozenset({ConnectionState.CLOSED, ConnectionState.BROKEN})


class _UnsolicitedDataError(Exception):
    """The worker sent more than the answer that was asked for. Raised in a parser callback, it stops the parser."""


class WorkerConnection(asyncio.Protocol):
    """One connection, which is also the answer (`UpstreamResponse`) to the request it carries.

    `on_idle` is called whenever the connection is free again, `on_closed` once, when it is closed. Every change of
    state goes through `_advance`, which also pauses and resumes reading and aborts the connection. Invariant: an idle
    connection is always read, and no connection is reused after unsolicited bytes.
    """

    def __init__(
        self, on_idle: Callable[[WorkerConnection], None], on_closed: Callable[[WorkerConnection], None]
    ) -> None:
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._state = ConnectionState.IDLE
        self._signal = Signal(self._loop)
        """Set whenever something has happened that the request may wait for."""
        self._sink: Sink | None = None
        """What gets the pieces of the body as they come."""
        self._sink_error: Exception | None = None
        self._refused = False
        """The sink took no more."""
        self._error: UpstreamError | None = None
        self._written = 0
        """Bytes of all requests so far, the current one included."""
        self._length = 0
        """Bytes of the current request."""
        self.since = 0.0
        """Loop time at which the current request was sent, or the last answer was finished."""
        self.closed = asyncio.Event()
        self._reset_answer(to_head=False)

    @property
    def state(self) -> ConnectionState:
        return self._state

    def _reset_answer(self, *, to_head: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self._to_head = to_head
        """The request was HEAD: the answer has no body."""
        self._until_close = False
        """The answer states no length: it ends with the connection."""
        self._header_bytes = 0
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0

    def _advance(self, event: ConnectionEvent) -> None:
        before = self._state
        state = CONNECTION_TRANSITIONS[before].get(event)
        if state is None:
            raise RuntimeError(f"{event.value!r} cannot happen to a connection to a worker that is {before.value}")
        self._state = state
        transport = self._transport
        if transport is None:
            return
        if state in _OVER:
            transport.abort()
        elif state is ConnectionState.STALLED:
            transport.pause_reading()
        elif before is ConnectionState.STALLED:
            transport.resume_reading()

    # --- the request's side ---

    async def send(self, head: bytes, body: bytes, *, bodiless: bool) -> None:
        """Send a request and wait for the head of its answer. Raises `UpstreamError`.

        `bodiless`: the answer has no body, because the request is HEAD.
        """
        self._write(head, body, bodiless)
        while self._state in _BEFORE_BODY and self._error is None:
            await self._signal
        if self._error is not None and not self.status:
            raise self._error

    def _write(self, head: bytes, body: bytes, bodiless: bool) -> None:
        transport = self._transport
        if transport is None or self._state is not ConnectionState.IDLE:
            message = "the connection was closed before the request was sent"
            raise UpstreamError(FailureCause.BROKEN, message, Progress.UNSENT)
        self._reset_answer(to_head=bodiless)
        self._advance(ConnectionEvent.REQUEST_SENT)
        self.since = self._loop.time()
        self._length = len(head) + len(body)
        self._written += self._length
        if len(body) <= SMALL_BODY:
            transport.write(head + body)
        else:
            transport.writelines((head, body))

    async def pass_on(self, sink: Sink) -> bool:
        """Hand the pieces of the body to `sink` as they come, within the callback that brings them, as long as it takes
        them. Returns whether that was all. Raises `UpstreamError`, and what `sink` raises."""
        while True:
            if self._pieces and not sink(self._take()):
                return False
            if self._state in _ANSWERED:
                return True
            if self._error is not None:
                raise self._error
            self._sink = sink
            try:
                await self._signal
            finally:
                # A request that is cancelled leaves nothing to the next one on this connection.
                self._sink = None
                error, self._sink_error = self._sink_error, None
                refused, self._refused = self._refused, False
            if error is not None:
                raise error
            if refused:
                return False

    def _feed(self, sink: Sink) -> None:
        """Hand over what has come, and wake the request if it has to go on itself."""
        try:
            self._refused = not sink(self._take())
        except Exception as error:  # noqa: BLE001  # raised in the request
            self._sink_error = error
            self._refused = True
        if self._refused:
            self._sink = None  # a task of asyncio's goes on in the loop's next turn, and more may come before
        if self._refused or self._state is not ConnectionState.BODY:
            self._signal.set()

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end. Raises `UpstreamError`."""
        while not self._pieces:
            if self._state in _ANSWERED:
                return b""
            if self._error is not None:
                raise self._error
            await self._signal
        return self._take()

    def _take(self) -> bytes:
        """What has come of the body."""
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._waiting_bytes = 0
        if self._state is ConnectionState.STALLED:
            self._advance(ConnectionEvent.READ)
        return piece

    def close(self) -> None:
        """Free the connection if the answer is complete; otherwise abort it, which cancels the request. Idempotent."""
        if self._state is ConnectionState.COMPLETE and self._transport is not None:
            self._pieces = []
            if self._transport.get_write_buffer_size():
                # The worker answered before it had read the request: the next request would wait behind the rest of it.
                self._advance(ConnectionEvent.CLOSED)
                return
            self._advance(ConnectionEvent.RELEASED)
            self.since = self._loop.time()
            self._on_idle(self)
        elif self._state is not ConnectionState.IDLE:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        if self._state not in _OVER:
            self._advance(ConnectionEvent.CLOSED)
            self._pieces = []
            self._signal.set_soon()

    def _fail(self, why: str, progress: Progress) -> None:
        self._error = UpstreamError(FailureCause.BROKEN, why, progress)
        self._advance(ConnectionEvent.FAILED)

    # --- the connection's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # connections to workers are stream transports

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is ConnectionState.WAITING:
            self._advance(ConnectionEvent.FIRST_BYTE)
        elif state is ConnectionState.IDLE or state is ConnectionState.COMPLETE:
            self._advance(ConnectionEvent.CLOSED)  # unsolicited bytes must not become part of the next answer
            return
        elif state in _OVER:
            return
        if self._state is ConnectionState.HEAD:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._state is ConnectionState.COMPLETE:
                self._advance(ConnectionEvent.CLOSED)  # the answer is complete, and unsolicited bytes follow it
            elif self._state not in _OVER:
                self._fail(f"the answer is not HTTP/1.1: {error}", Progress.ANSWERING)
        if self._state is ConnectionState.HEAD and self._header_bytes > MAX_HEADER_BYTES:
            self._fail(f"the headers of the answer take more than {MAX_HEADER_BYTES} bytes", Progress.ANSWERING)
        elif self._state is ConnectionState.BODY and self._waiting_bytes > HIGH_WATER:
            self._advance(ConnectionEvent.HIGH_WATER)
        if self._sink is not None and self._pieces:
            self._feed(self._sink)
        elif self._state is not ConnectionState.HEAD:
            self._signal.set()

    def eof_received(self) -> None:
        """The worker closed its end in order: its kernel's acknowledgements say how much of the request had arrived.

        After a reset they say nothing: the acknowledgement that a reset carries is not counted, and a process that has
        read every byte may send a reset too.
        """
        if self._state is ConnectionState.WAITING and self._transport is not None:
            received = bytes_received(self._transport)
            before = self._written - self._length
            if received is not None and before <= received < self._written:
                self._fail("the worker closed the connection before it received the request", Progress.UNSENT)
                self._signal.set()

    def connection_lost(self, exc: Exception | None) -> None:
        state = self._state
        if state is ConnectionState.WAITING:
            self._fail("the worker closed the connection before its answer", Progress.UNANSWERED)
        elif state is ConnectionState.HEAD:
            self._fail("the worker closed the connection before its answer", Progress.ANSWERING)
        elif state in (ConnectionState.BODY, ConnectionState.STALLED) and not (self._until_close and exc is None):
            self._fail("the worker closed the connection within its answer", Progress.ANSWERING)
        elif state not in _OVER:
            self._advance(ConnectionEvent.CLOSED)  # an answer without a length ends with its connection
        self._transport = None
        self.closed.set()
        self._on_closed(self)
        self._signal.set()

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        if self._state is not ConnectionState.HEAD:
            raise _UnsolicitedDataError
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state is ConnectionState.HEAD:  # in any other state it is a trailer, which is not passed on
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:
            return  # an interim answer, such as 100 Continue
        self.status = status
        if self._to_head:  # the parser would wait for the body that the headers describe
            keep = self._parser.should_keep_alive()
            self._parser = httptools.HttpResponseParser(self)
            self._advance(ConnectionEvent.ANSWER_COMPLETE if keep else ConnectionEvent.CLOSED)
            return
        self._advance(ConnectionEvent.HEAD_COMPLETE)
        self._until_close = not any(
            name == b"content-length" or (name == b"transfer-encoding" and value.lower().endswith(b"chunked"))
            for name, value in self.headers
        )

    def on_body(self, body: bytes) -> None:
        if self._state is not ConnectionState.BODY:
            raise _UnsolicitedDataError
        self._pieces.append(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._state is ConnectionState.BODY:
            keep = self._parser.should_keep_alive()
            self._advance(ConnectionEvent.ANSWER_COMPLETE if keep else ConnectionEvent.CLOSED)


def bytes_received(transport: asyncio.BaseTransport) -> int | None:
    """How many of the bytes written to a TCP connection the other end's kernel has acknowledged; None: unknown.

    A close carries the same acknowledgement, so after a close the number is exact. It is Linux's
    `tcp_info.tcpi_bytes_acked` less one, because Linux counts the handshake as one byte. Over TLS it is unknown: the
    bytes on the wire are not those written.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or transport.get_extra_info("ssl_object") is not None or not hasattr(socket, "TCP_INFO"):
        return None
    try:
        info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return None
    if len(info) < _BYTES_ACKED + 8:
        return None
    acknowledged: int = struct.unpack_from("Q", info, _BYTES_ACKED)[0]
    return acknowledged - 1


_BYTES_ACKED = 120
"""Offset of `tcpi_bytes_acked` (u64) in Linux's `struct tcp_info`, where it has been since 4.2."""
