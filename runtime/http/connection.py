"""One HTTP/1.1 connection and the requests on it: an explicit state machine on httptools, with a limit on everything
that the client may hold."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from enum import Enum
from math import inf
from typing import Any

from starlette.types import Scope

from runtime.http.context import Headers, ServerContext, ServerState
from runtime.http.limits import Refusal
from runtime.http.reader import RequestReader
from runtime.http.request import AnswerState, ServerRequest
from runtime.inline import InlineTask
from runtime.logs import EventLogger
from runtime.tls_listener import CLIENT_IDENTITY, identity

logger = EventLogger(__name__)

LINGER = 2.0
"""Seconds a refused connection is still read (and what comes is thrown away): closing it with unread bytes would reset
it, and the client might never see the answer that says why."""
MOST_UNWANTED = 65_536
"""Bytes that are read of a body which nobody wants. If more is announced, or it is unknown how much will come, the
connection is closed after the answer instead."""
_TIMER_SLACK = 0.002
"""Seconds: uvloop's timers count milliseconds, and may fire that much early."""


class ReadState(Enum):
    """Where the request that is read stands. The answer to an earlier one may be under way meanwhile."""

    __hash__ = object.__hash__  # Enum's is a Python function, called for each transition of each request

    IDLE = "idle"
    """No byte of it has come. Ends after `keep_alive`, unless an answer is under way."""
    HEAD = "headers"
    """Ends after `header_timeout`."""
    BODY = "body"
    """Ends after `body_timeout` without a byte."""
    UNWANTED = "unwanted body"
    """The request is answered by its headers alone, and its body thrown away. Ends `LINGER` after the answer."""
    DISCARDING = "discarding"
    """What comes is thrown away: a request was refused. Ends after `LINGER`, once all is answered."""
    ENDED = "ended"
    """The last request is there: what follows is thrown away. Ends with its answer."""
    CLOSED = "closed"
    """The connection is gone, or goes once the client has read what was written; it has `write_timeout` for that."""


class ReadEvent(Enum):
    """What moves the reading of a request on."""

    __hash__ = object.__hash__  # Enum's is a Python function, called for each transition of each request

    BEGUN = "begun"
    """The first byte of a request has come."""
    HEAD_COMPLETE = "head complete"
    TURNED_AWAY = "turned away"
    """The head is complete, and nobody wants the body."""
    REQUEST_COMPLETE = "request complete"
    LAST = "last"
    """The request that is complete was the last that the client sends."""
    REFUSED = "refused"
    CLOSED = "closed"


READ_TRANSITIONS: Mapping[ReadState, Mapping[ReadEvent, ReadState]] = {
    ReadState.IDLE: {
        ReadEvent.BEGUN: ReadState.HEAD,
        ReadEvent.LAST: ReadState.ENDED,
        ReadEvent.REFUSED: ReadState.DISCARDING,
        ReadEvent.CLOSED: ReadState.CLOSED,
    },
    ReadState.HEAD: {
        ReadEvent.HEAD_COMPLETE: ReadState.BODY,
        ReadEvent.TURNED_AWAY: ReadState.UNWANTED,
        ReadEvent.REFUSED: ReadState.DISCARDING,
        ReadEvent.CLOSED: ReadState.CLOSED,
    },
    ReadState.BODY: {
        ReadEvent.REQUEST_COMPLETE: ReadState.IDLE,
        ReadEvent.REFUSED: ReadState.DISCARDING,
        ReadEvent.CLOSED: ReadState.CLOSED,
    },
    ReadState.UNWANTED: {
        ReadEvent.REQUEST_COMPLETE: ReadState.IDLE,
        ReadEvent.REFUSED: ReadState.DISCARDING,
        ReadEvent.CLOSED: ReadState.CLOSED,
    },
    ReadState.ENDED: {ReadEvent.CLOSED: ReadState.CLOSED},
    ReadState.DISCARDING: {ReadEvent.CLOSED: ReadState.CLOSED},
    ReadState.CLOSED: {},
}
"""What is not listed cannot happen, and is an error."""
_UNREAD = frozenset({ReadState.ENDED, ReadState.DISCARDING, ReadState.CLOSED})
_TIMED_AS_A_WHOLE = frozenset({ReadState.HEAD, ReadState.UNWANTED})
"""Each further byte prolongs the time of the others."""


class ServerConnection(asyncio.Protocol):
    """One client connection.

    `_request` is the request being answered, `_queue` holds those that came whole meanwhile; while it holds any the
    client is not read. Every state of reading has a deadline, and one timer serves them all. The timer is set when a
    read leaves something unfinished, so that a connection that serves a request has none running. A deadline that moves
    away does not move the timer: the timer then runs out too early, and is set anew.
    """

    def __init__(self, context: ServerContext, loop: asyncio.AbstractEventLoop, refusal: Refusal | None = None) -> None:
        """`refusal`: how the connection is answered, whatever it asks for."""
        self._context = context
        self._refusal = refusal
        self._limits = context.limits
        self._loop = loop
        self._reading = ReadState.IDLE
        self._request: ServerRequest | None = None
        self._queue: deque[ServerRequest] = deque()
        self._arrived: ServerRequest | None = None
        """It has come whole while nothing was being answered, and starts when what has come is read."""
        self._paused = False
        self._discardable = inf
        """Bytes that are still read to be thrown away."""
        self._drained: asyncio.Event | None = None
        """Made when the client does not read; set when it does again."""
        self._write_timer: asyncio.TimerHandle | None = None
        self._deadline = inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._idle_since = 0.0
        """Loop time; 0: since before the server began to stop."""
        self._reader: RequestReader
        self._transport: asyncio.Transport

    # --- the one place where the state changes, and its time ---

    def _advance(self, event: ReadEvent) -> None:
        before = self._reading
        try:
            reading = READ_TRANSITIONS[before][event]
        except KeyError:
            raise RuntimeError(f"an HTTP connection in state {before.value!r} takes no event {event.value!r}") from None
        if before is ReadState.BODY and reading is not ReadState.IDLE:
            self._context.release(1, self._reader.held_bytes)  # it will not be answered
        self._reading = reading
        if reading is not ReadState.IDLE and reading is not ReadState.BODY:  # `data_received` sets theirs, at its end
            self._set_deadline()

    def _set_deadline(self) -> None:
        """From now on the state has its whole time."""
        reading, limits = self._reading, self._limits
        if reading is ReadState.IDLE:
            seconds = limits.keep_alive if self._request is None else inf
        elif reading is ReadState.CLOSED:
            seconds = limits.write_timeout
        elif reading is ReadState.DISCARDING or reading is ReadState.UNWANTED:
            seconds = LINGER if self._request is None else inf
        elif reading is ReadState.ENDED:
            seconds = inf  # it is for us to answer
        elif self._paused:
            seconds = inf  # it is for us to read on
        else:
            seconds = limits.header_timeout if reading is ReadState.HEAD else limits.body_timeout
        self._deadline = self._loop.time() + seconds

    def _set_timer(self) -> None:
        if self._deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = self._deadline
            self._timer = self._loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, inf
        if self._loop.time() < self._deadline - _TIMER_SLACK:
            self._set_timer()
        elif self._reading is ReadState.IDLE or self._reading is ReadState.UNWANTED:
            self.close()
        elif self._reading is ReadState.HEAD or self._reading is ReadState.BODY:
            message = f"The request's {self._reading.value} did not arrive in time."
            self._refuse(Refusal(408, message, "RequestTimeout"))
        else:
            self._drop()

    # --- transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # clients' connections are stream transports
        server, client = (_address(transport.get_extra_info(name)) for name in ("sockname", "peername"))
        scope: Scope = {"server": server, "client": client, "scheme": "http"}
        if (session := transport.get_extra_info("ssl_object")) is not None:
            scope["scheme"] = "https"
            scope["extensions"] = {CLIENT_IDENTITY: identity(session.getpeercert())}
        self._reader = RequestReader(self, self._context, scope)
        self._context.connections.add(self)
        if self._refusal is not None:
            self._refuse(self._refusal)
            return
        self._set_deadline()
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        context, request = self._context, self._request
        if self._reading is not ReadState.CLOSED:
            self._advance(ReadEvent.CLOSED)
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer, self._write_timer, self._deadline = None, None, inf
        self._drop_queue()
        self._request = None
        if request is not None:
            context.release(1, request.held_bytes)
            request.disconnected()
            if context.cancel_on_disconnect and request.task is not None:
                request.task.cancel("the client disconnected")
        if self._drained is not None:
            self._drained.set()
        self._reader.close()
        context.connections.closed(self)

    def pause_writing(self) -> None:
        self._drained = asyncio.Event()
        self._write_timer = self._loop.call_later(self._limits.write_timeout, self._drop)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _drop(self) -> None:
        if self._reading is not ReadState.DISCARDING:
            logger.info(
                "client_dropped",
                why="it does not read its answer",
                client=str(self._transport.get_extra_info("peername")),
            )
        self._transport.abort()

    def close(self) -> None:
        """Close once the client has read what was written, or after `write_timeout`."""
        if self._reading is not ReadState.CLOSED:
            self._advance(ReadEvent.CLOSED)
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._set_timer()

    def _drop_queue(self) -> None:
        for request in self._queue:
            self._context.release(1, request.held_bytes)
        self._queue.clear()

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        if self._reading in _UNREAD:
            self._discardable -= len(data)
            if self._discardable < 0:
                self._transport.pause_reading()
            return
        try:
            self._reader.feed(data)
        except Refusal as refusal:
            self._unreadable(refusal)
            if self._arrived is not None:
                self._start_arrived()
            return
        if self._arrived is not None:
            self._start_arrived()
        if self._reading not in _TIMED_AS_A_WHOLE:
            self._set_deadline()
        self._set_timer()

    def request_begun(self) -> None:
        self._advance(ReadEvent.BEGUN)

    def head_complete(self, expects_continue: bool) -> None:
        self._advance(ReadEvent.HEAD_COMPLETE)
        if expects_continue and self._request is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def turned_away(self, scope: Scope, rest: int | None, last: bool) -> bool:
        self._advance(ReadEvent.TURNED_AWAY)
        passed = rest is not None and rest <= MOST_UNWANTED
        if not passed:
            self._discardable = MOST_UNWANTED
            self._advance(ReadEvent.REFUSED)
        self._requested(scope, b"", last or not passed)
        return passed

    def request_complete(self, scope: Scope, body: bytes | bytearray, last: bool) -> None:
        answered = self._reading is ReadState.UNWANTED
        self._advance(ReadEvent.REQUEST_COMPLETE)
        if last:
            self._advance(ReadEvent.LAST)
        if not answered:
            self._requested(scope, body, last)

    def _requested(self, scope: Scope, body: bytes | bytearray, last: bool) -> None:
        context = self._context
        if context.state is ServerState.STOPPING:
            context.arrived_at = self._loop.time()
        request = ServerRequest(self, scope, body, not last and context.state is ServerState.SERVING)
        if self._request is None:
            self._request = self._arrived = request
        else:
            self._queue.append(request)
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()

    # --- answering ---

    def _start_arrived(self) -> None:
        """Begin to answer a request. A handler runs on from here, before this returns."""
        request, self._arrived = self._arrived, None
        if request is None or request is not self._request:
            return  # the connection is gone
        context, loop = self._context, self._loop
        if context.handler is not None:
            request.task = inline = InlineTask(loop, request.handle(context.handler), context.ended)
            context.tasks.add(inline)
            inline.step()
        elif context.app is not None:
            request.task = task = loop.create_task(request.run(context.app))
            context.tasks.add(task)
            task.add_done_callback(context.ended)

    def _start_next(self) -> None:
        """Answer the next request, in a turn of the loop of its own: the last one's task may still be running."""
        self._request = self._arrived = self._queue.popleft()
        self._loop.call_soon(self._start_arrived)

    @property
    def writable(self) -> bool:
        return self._drained is None

    async def drain(self) -> None:
        while self._drained is not None and self._reading is not ReadState.CLOSED:
            await self._drained.wait()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def release_body(self, size: int) -> None:
        self._context.release(0, size)

    def common_headers(self) -> Headers:
        return self._context.common_headers()

    def refusal_headers(self, request: Headers) -> Headers:
        return self._context.refusal_headers(request)

    def answered(self) -> None:
        request, self._request = self._request, None
        if request is None:
            return  # the connection is gone
        self._context.release(1, request.held_bytes)
        if not request.keep_alive or self._reading is ReadState.CLOSED:
            self._drop_queue()
            if self._reading is ReadState.UNWANTED:
                self._advance(ReadEvent.REFUSED)
            if self._reading is ReadState.DISCARDING:
                self._linger()
            else:
                self.close()
            return
        if self._queue:
            self._start_next()
        elif self._context.state is ServerState.STOPPING:
            self._idle_since = self._loop.time()
        if self._paused and not self._queue:
            self._paused = False
            self._transport.resume_reading()
            self._set_deadline()
        elif self._reading is ReadState.IDLE or self._reading is ReadState.UNWANTED:
            self._set_deadline()
        self._set_timer()

    # --- refusing ---

    def _unreadable(self, refusal: Refusal) -> None:
        if self._reading is not ReadState.ENDED:  # what follows a last request is not read
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what cannot be served, then read and discard for a while before closing."""
        self._advance(ReadEvent.REFUSED)
        context = self._context
        context.on_refusal(refusal.status)
        if self._request is not None:  # the answer under way is finished; nothing may be written into it
            self._drop_queue()
            self._request.keep_alive = False
            return
        self._transport.write(refusal.raw([*context.common_headers(), *context.refusal_headers(self._reader.headers)]))
        self._linger()

    def _linger(self) -> None:
        """All is answered, and what the client is still sending is of no use: see `LINGER`."""
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self._transport.can_write_eof():  # TLS has no half-closed connections
            self._transport.write_eof()
        self._set_deadline()
        self._set_timer()

    # --- stopping ---

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def drain_requests(self) -> None:
        """Let the last answer that has been asked for say `Connection: close`, unless its head has gone out."""
        last = self._queue[-1] if self._queue else self._request
        if last is not None and last.state is AnswerState.PENDING:
            last.keep_alive = False

    def close_if_idle(self, since: float) -> None:
        """Close without a word, if the connection has been idle since this loop time or longer."""
        if self._request is None and self._reading is ReadState.IDLE and self._idle_since <= since:
            self.close()


def _address(info: Any) -> tuple[str, int] | None:
    """Host and port, of an IPv4 or IPv6 socket's name."""
    return (str(info[0]), int(info[1])) if info else None
