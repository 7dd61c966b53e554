"""One HTTP/1.1 connection and the requests on it: an explicit state machine on httptools, with a bound on everything
that the client may hold. `runtime.http.server` is the door."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import Enum
from math import inf
from typing import Any

from starlette.types import Scope

from runtime.http.limits import LINGER
from runtime.http.reader import RequestReader
from runtime.http.refusal import Refusal
from runtime.http.request import AnswerState, Cycle
from runtime.http.serving import Headers, ServingState
from runtime.logs import event

logger = logging.getLogger(__name__)

_TIMER_SLACK = 0.002
"""Seconds: uvloop's timers count milliseconds, and may fire that much early."""


class Reading(Enum):
    """Where the request that is read stands. The answer to an earlier one may be under way meanwhile."""

    IDLE = "idle"
    """No byte of it has come. Ends after `keep_alive`, unless an answer is under way."""
    HEAD = "headers"
    """Ends after `header_timeout`."""
    BODY = "body"
    """Ends after `body_timeout` without a byte."""
    DEAF = "deaf"
    """What comes is thrown away: a request was refused, or was the last. Ends after `LINGER`, once all is answered."""
    CLOSED = "closed"
    """The connection is gone, or goes once the client has read what was written; it has `write_timeout` for that."""


_NEXT: dict[Reading, frozenset[Reading]] = {
    Reading.IDLE: frozenset({Reading.HEAD, Reading.DEAF, Reading.CLOSED}),
    Reading.HEAD: frozenset({Reading.BODY, Reading.DEAF, Reading.CLOSED}),
    Reading.BODY: frozenset({Reading.IDLE, Reading.DEAF, Reading.CLOSED}),
    Reading.DEAF: frozenset({Reading.CLOSED}),
    Reading.CLOSED: frozenset(),
}


class Connection(asyncio.Protocol):
    """One client connection.

    `_cycle` is the request being answered, `_queue` holds those that came whole meanwhile; while it holds any the
    client is not read. Every change of state goes through `_enter`; what the state waits for has a time (`_due`) that
    one timer serves. A connection that serves a request has none running: it is armed when a read leaves something
    unfinished, and a time that moves away only lets it ring in vain.
    """

    def __init__(self, state: ServingState, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = state
        self._limits = state.limits
        self._loop = loop
        self._reading = Reading.IDLE
        self._cycle: Cycle | None = None
        self._queue: deque[Cycle] = deque()
        self._paused = False
        self._drained: asyncio.Event | None = None
        """Made when the client does not read; set when it does again."""
        self._unread: asyncio.TimerHandle | None = None
        self._due = inf
        self._timer: asyncio.TimerHandle | None = None
        self._rings = inf
        self._idle_since = 0.0
        """Loop time; 0: since before the server began to stop."""
        self._reader: RequestReader
        self._transport: asyncio.Transport

    # --- the one place where the state changes, and its time ---

    def _enter(self, reading: Reading) -> None:
        if reading not in _NEXT[self._reading]:
            raise RuntimeError(f"an HTTP connection cannot become {reading.value} when it is {self._reading.value}")
        if self._reading is Reading.BODY and reading is not Reading.IDLE:
            self._shared.release(1, self._reader.held)  # it will not be answered
        self._reading = reading
        self._set_due()

    def _set_due(self) -> None:
        """From now on the state has its whole time."""
        reading, limits = self._reading, self._limits
        if reading is Reading.IDLE:
            seconds = limits.keep_alive if self._cycle is None else inf
        elif reading is Reading.CLOSED:
            seconds = limits.write_timeout
        elif reading is Reading.DEAF:
            seconds = LINGER if self._cycle is None else inf
        elif self._paused:
            seconds = inf  # it is for us to read on
        else:
            seconds = limits.header_timeout if reading is Reading.HEAD else limits.body_timeout
        self._due = self._loop.time() + seconds

    def _arm(self) -> None:
        if self._due < self._rings:
            if self._timer is not None:
                self._timer.cancel()
            self._rings = self._due
            self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings = None, inf
        if self._loop.time() < self._due - _TIMER_SLACK:
            self._arm()
        elif self._reading is Reading.IDLE:
            self._close()
        elif self._reading is Reading.HEAD or self._reading is Reading.BODY:
            message = f"The request's {self._reading.value} did not arrive in time."
            self._refuse(Refusal(408, message, "RequestTimeout"))
        else:
            self._drop()

    # --- transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # clients' connections are stream transports
        server, client = (_address(transport.get_extra_info(name)) for name in ("sockname", "peername"))
        self._reader = RequestReader(self, self._shared, {"server": server, "client": client})
        self._shared.connections.add(self)
        self._set_due()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        shared, cycle = self._shared, self._cycle
        if self._reading is not Reading.CLOSED:
            self._enter(Reading.CLOSED)
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        self._timer, self._unread, self._due = None, None, inf
        self._drop_queue()
        self._cycle = None
        if cycle is not None:
            shared.release(1, cycle.held)
            cycle.abandon()
            if shared.cancel_on_disconnect and cycle.task is not None:
                cycle.task.cancel("the client disconnected")
        if self._drained is not None:
            self._drained.set()
        self._reader.close()
        shared.connections.discard(self)
        shared.changed.set()

    def pause_writing(self) -> None:
        self._drained = asyncio.Event()
        self._unread = self._loop.call_later(self._limits.write_timeout, self._drop)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _drop(self) -> None:
        if self._reading is not Reading.DEAF:
            event(
                logger,
                logging.INFO,
                "client_dropped",
                why="it does not read its answer",
                client=str(self._transport.get_extra_info("peername")),
            )
        self._transport.abort()

    def _close(self) -> None:
        """Close once the client has read what was written, or after `write_timeout`."""
        if self._reading is not Reading.CLOSED:
            self._enter(Reading.CLOSED)
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._arm()

    def _drop_queue(self) -> None:
        for cycle in self._queue:
            self._shared.release(1, cycle.held)
        self._queue.clear()

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        if self._reading is Reading.DEAF or self._reading is Reading.CLOSED:
            return
        try:
            self._reader.feed(data)
        except Refusal as refusal:
            self._unreadable(refusal)
            return
        if self._reading is not Reading.HEAD:  # its time began with its first byte
            self._set_due()
        self._arm()

    def request_begun(self) -> None:
        self._enter(Reading.HEAD)

    def head_complete(self, expects_continue: bool) -> None:
        self._enter(Reading.BODY)
        if expects_continue and self._cycle is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def request_complete(self, scope: Scope, body: bytes | bytearray, last: bool) -> None:
        shared = self._shared
        self._enter(Reading.IDLE)
        if last:
            self._enter(Reading.DEAF)
        if shared.stopping:
            shared.arrived_at = self._loop.time()
        cycle = Cycle(self, scope, body, not last and not shared.draining)
        if self._cycle is None:
            self._start(cycle)
        else:
            self._queue.append(cycle)
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()

    # --- answering ---

    def _start(self, cycle: Cycle) -> None:
        self._cycle = cycle
        tasks = self._shared.tasks
        cycle.task = task = self._loop.create_task(cycle.run(self._shared.app))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    @property
    def writable(self) -> bool:
        return self._drained is None

    async def drain(self) -> None:
        while self._drained is not None and self._reading is not Reading.CLOSED:
            await self._drained.wait()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def release_body(self, size: int) -> None:
        self._shared.release(0, size)

    def common_headers(self) -> Headers:
        return self._shared.common_headers()

    def refusal_headers(self, request: Headers) -> Headers:
        return self._shared.refusal_headers(request)

    def cut(self) -> None:
        self._close()

    def answered(self) -> None:
        cycle, self._cycle = self._cycle, None
        if cycle is None:
            return  # the connection is gone
        self._shared.release(1, cycle.held)
        if not cycle.keep_alive or self._reading is Reading.CLOSED:
            self._close()
            return
        if self._queue:
            self._start(self._queue.popleft())
        elif self._shared.stopping:
            self._idle_since = self._loop.time()
        if self._paused and not self._queue:
            self._paused = False
            self._transport.resume_reading()
            self._set_due()
        elif self._reading is Reading.IDLE:
            self._set_due()
        self._arm()

    # --- refusing ---

    def _unreadable(self, refusal: Refusal) -> None:
        if self._reading is not Reading.DEAF:  # what follows a last request is not read
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what cannot be served, then read and discard for a while before closing."""
        self._enter(Reading.DEAF)
        shared = self._shared
        shared.on_refusal(refusal.status)
        if self._cycle is not None:  # the answer under way is finished; nothing may be written into it
            self._drop_queue()
            self._cycle.keep_alive = False
            return
        self._transport.write(refusal.raw([*shared.common_headers(), *shared.refusal_headers(self._reader.headers)]))
        self._transport.write_eof()
        self._arm()

    # --- stopping ---

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def drain_requests(self) -> None:
        """Let the last answer that has been asked for say `Connection: close`, unless its head is out."""
        last = self._queue[-1] if self._queue else self._cycle
        if last is not None and last.state is AnswerState.PENDING:
            last.keep_alive = False

    def close_if_idle(self, since: float) -> None:
        """Close without a word, if it has been idle since this loop time or longer."""
        if self._cycle is None and self._reading is Reading.IDLE and self._idle_since <= since:
            self._close()


def _address(info: Any) -> tuple[str, int] | None:
    """Host and port, of an IPv4 or IPv6 socket's name."""
    return (str(info[0]), int(info[1])) if info else None
