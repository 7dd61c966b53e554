"""One connection to a worker, and the answer to the request it carries: an explicit state machine on httptools."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import Enum

import httptools

from router.upstream.interface import Cause, Progress, UpstreamError
from runtime.http.context import Headers

MAX_HEADER_BYTES = 131_072
HIGH_WATER = 262_144
"""Bytes of an answer that wait for the client before the worker is no longer read."""
SMALL_BODY = 65_536
"""Bodies up to this size (bytes) are copied behind their head and go out in one write; larger ones are never copied."""


class LinkState(Enum):
    """Where a connection and its current exchange stand."""

    IDLE = "idle"
    """Nothing has been asked: it may carry the next request."""
    WAITING = "waiting"
    """A request was written, and no byte of its answer has come."""
    HEAD = "head"
    """Part of the answer's head has come, or an interim answer (1xx)."""
    BODY = "body"
    """The head has come whole; its body is read as it arrives."""
    STALLED = "stalled"
    """As BODY, but more is waiting for the client than should: the connection is not read."""
    COMPLETE = "complete"
    """The whole answer has come, and both sides keep the connection."""
    CLOSED = "closed"
    """The connection is gone or being cut; there was no exchange, or its answer is whole, or nobody wants it."""
    BROKEN = "broken"
    """The connection is gone or being cut, and the answer is not whole."""


_NEXT: dict[LinkState, frozenset[LinkState]] = {
    LinkState.IDLE: frozenset({LinkState.WAITING, LinkState.CLOSED}),
    LinkState.WAITING: frozenset({LinkState.HEAD, LinkState.CLOSED, LinkState.BROKEN}),
    LinkState.HEAD: frozenset({LinkState.BODY, LinkState.COMPLETE, LinkState.CLOSED, LinkState.BROKEN}),
    LinkState.BODY: frozenset({LinkState.STALLED, LinkState.COMPLETE, LinkState.CLOSED, LinkState.BROKEN}),
    LinkState.STALLED: frozenset({LinkState.BODY, LinkState.CLOSED, LinkState.BROKEN}),
    LinkState.COMPLETE: frozenset({LinkState.IDLE, LinkState.CLOSED}),
    LinkState.CLOSED: frozenset(),
    LinkState.BROKEN: frozenset(),
}
_ANSWERED = frozenset({LinkState.COMPLETE, LinkState.CLOSED})
_BEFORE_BODY = frozenset({LinkState.WAITING, LinkState.HEAD})
_OVER = frozenset({LinkState.CLOSED, LinkState.BROKEN})


class _Surplus(Exception):
    """More came than the answer that was asked for; raised inside a parser callback it stops the parser."""


class Link(asyncio.Protocol):
    """One connection; it is also the answer (`UpstreamResponse`) to the request it carries.

    `idle` is called when the connection is free again, `gone` once, when it is lost. Every change of state goes through
    `_enter`, which also stops and starts reading and cuts the connection: none is free that is not read, and none is
    used again after bytes that nobody asked for.
    """

    def __init__(self, idle: Callable[[Link], None], gone: Callable[[Link], None]) -> None:
        self._idle = idle
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._state = LinkState.IDLE
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._written = 0
        """Bytes of all requests so far, the current one included."""
        self._length = 0
        """Bytes of the current one."""
        self.exchanges = 0
        self.since = 0.0
        """Loop time at which the current exchange began, or the last one ended."""
        self.lost = asyncio.Event()
        self._expect(head=False)

    @property
    def state(self) -> LinkState:
        return self._state

    def _expect(self, *, head: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self._is_head = head
        self._until_close = False
        self._header_bytes = 0
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0

    def _enter(self, state: LinkState) -> None:
        before = self._state
        if state not in _NEXT[before]:
            raise RuntimeError(f"a connection to a worker cannot become {state.value} while it is {before.value}")
        self._state = state
        transport = self._transport
        if transport is None:
            return
        if state in _OVER:
            transport.abort()
        elif state is LinkState.STALLED:
            transport.pause_reading()
        elif before is LinkState.STALLED:
            transport.resume_reading()

    # --- the request's side ---

    async def exchange(self, head: bytes, body: bytes, *, bodiless: bool) -> None:
        """Send a request and wait for the head of its answer (`bodiless`: to HEAD). Raises `UpstreamError`."""
        self._write(head, body, bodiless)
        while self._state in _BEFORE_BODY:
            await self._wait()
        if self._error is not None and not self.status:
            raise self._error

    def _write(self, head: bytes, body: bytes, bodiless: bool) -> None:
        transport = self._transport
        if transport is None or self._state is not LinkState.IDLE:
            message = "the connection was closed before the request was sent"
            raise UpstreamError(Cause.BROKEN, message, Progress.UNSENT)
        self._expect(head=bodiless)
        self._enter(LinkState.WAITING)
        self.exchanges += 1
        self.since = self._loop.time()
        self._length = len(head) + len(body)
        self._written += self._length
        if len(body) <= SMALL_BODY:
            transport.write(head + body)
        else:
            transport.writelines((head, body))

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end. Raises `UpstreamError`."""
        while not self._pieces:
            if self._state in _ANSWERED:
                return b""
            await self._wait()
            if self._error is not None and not self._pieces:
                raise self._error
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._waiting_bytes = 0
        if self._state is LinkState.STALLED:
            self._enter(LinkState.BODY)
        return piece

    def close(self) -> None:
        """Free the connection if the answer is complete, else cut it, which cancels the request. Idempotent."""
        if self._state is LinkState.COMPLETE and self._transport is not None:
            self._pieces = []
            if self._transport.get_write_buffer_size():
                self._enter(LinkState.CLOSED)  # answered before the request was read: the next would wait behind it
                return
            self._enter(LinkState.IDLE)
            self.since = self._loop.time()
            self._idle(self)
        elif self._state is not LinkState.IDLE:
            self.abort()

    def abort(self) -> None:
        """Cut the connection."""
        if self._state not in _OVER:
            self._enter(LinkState.CLOSED)
            self._pieces = []
            self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _break(self, why: str, progress: Progress) -> None:
        self._error = UpstreamError(Cause.BROKEN, why, progress)
        self._enter(LinkState.BROKEN)
        self._wake()

    # --- the connection's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # connections to workers are stream transports

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is LinkState.WAITING:
            self._enter(LinkState.HEAD)
        elif state is LinkState.IDLE or state is LinkState.COMPLETE:
            self._enter(LinkState.CLOSED)  # nothing was asked: whatever this is must not become the next answer
            return
        elif state in _OVER:
            return
        if self._state is LinkState.HEAD:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._state is LinkState.COMPLETE:
                self._enter(LinkState.CLOSED)  # the answer is whole; what comes behind it is nobody's
            elif self._state not in _OVER:
                self._break(f"the answer is not HTTP/1.1: {error}", Progress.ANSWERING)
        if self._state is LinkState.HEAD and self._header_bytes > MAX_HEADER_BYTES:
            self._break(f"the headers of the answer take more than {MAX_HEADER_BYTES} bytes", Progress.ANSWERING)
        elif self._state is LinkState.BODY and self._waiting_bytes > HIGH_WATER:
            self._enter(LinkState.STALLED)
        self._wake()

    def eof_received(self) -> None:
        """The worker closed: what it had received by then is known. A reset says nothing of that: its acknowledgement
        is not counted, and anybody may send one who has read every byte."""
        if self._state is LinkState.WAITING and self._transport is not None:
            received = bytes_received(self._transport)
            before = self._written - self._length
            if received is not None and before <= received < self._written:
                self._break("the worker closed the connection before it received the request", Progress.UNSENT)

    def connection_lost(self, exc: Exception | None) -> None:
        state = self._state
        if state is LinkState.WAITING:
            self._break("the worker closed the connection before its answer", Progress.UNANSWERED)
        elif state is LinkState.HEAD:
            self._break("the worker closed the connection before its answer", Progress.ANSWERING)
        elif state in (LinkState.BODY, LinkState.STALLED) and not (self._until_close and exc is None):
            self._break("the worker closed the connection within its answer", Progress.ANSWERING)
        elif state not in _OVER:
            self._enter(LinkState.CLOSED)  # an answer without a length ends with its connection
        self._transport = None
        self.lost.set()
        self._gone(self)
        self._wake()

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        if self._state is not LinkState.HEAD:
            raise _Surplus
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state is LinkState.HEAD:  # else it is a trailer, which is not passed on
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:
            return  # 100 Continue and the like: the answer is yet to come
        self.status = status
        if self._is_head:  # the parser would wait for the body that the headers describe
            keep = self._parser.should_keep_alive()
            self._parser = httptools.HttpResponseParser(self)
            self._enter(LinkState.COMPLETE if keep else LinkState.CLOSED)
            return
        self._enter(LinkState.BODY)
        self._until_close = not any(
            name == b"content-length" or (name == b"transfer-encoding" and value.lower().endswith(b"chunked"))
            for name, value in self.headers
        )

    def on_body(self, body: bytes) -> None:
        if self._state is not LinkState.BODY:
            raise _Surplus
        self._pieces.append(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._state is LinkState.BODY:
            self._enter(LinkState.COMPLETE if self._parser.should_keep_alive() else LinkState.CLOSED)


def bytes_received(transport: asyncio.BaseTransport) -> int | None:
    """How many of the bytes written to a TCP connection the other end's kernel has acknowledged; None: not known.

    A close carries the same acknowledgement, so after one it says for certain whether a request had arrived before.
    Linux's `tcp_info.tcpi_bytes_acked`, which counts the handshake as one byte. With TLS the bytes are others.
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
