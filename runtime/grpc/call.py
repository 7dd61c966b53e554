"""One gRPC call, which is one HTTP/2 stream: its messages, its two windows, its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from runtime.grpc.frames import (
    BEGINNING,
    END_HEADERS,
    END_STREAM,
    HEAD,
    PREFIX,
    ErrorCode,
    Kind,
    Status,
    frame,
    reset,
    trailers,
    window_update,
)
from runtime.logs import EventLogger

if TYPE_CHECKING:
    from runtime.grpc.connection import Connection

logger = EventLogger(__name__)

WINDOW = 2**20
"""Bytes that a client may send on a stream before we say that we have taken them."""


class CallState(Enum):
    """Who may still say something. RFC 9113, section 5.1, calls them open, half-closed (remote) and closed."""

    __hash__ = object.__hash__

    OPEN = "open"
    INPUT_ENDED = "input ended"
    """The client has said all."""
    CLOSED = "closed"


class CallEvent(Enum):
    """What ends something."""

    __hash__ = object.__hash__

    INPUT_ENDED = "client ended its side"
    ANSWERED = "status sent"
    RESET = "reset or connection lost"


CALL_TRANSITIONS: Mapping[CallState, Mapping[CallEvent, CallState]] = {
    CallState.OPEN: {
        CallEvent.INPUT_ENDED: CallState.INPUT_ENDED,
        CallEvent.ANSWERED: CallState.CLOSED,
        CallEvent.RESET: CallState.CLOSED,
    },
    CallState.INPUT_ENDED: {CallEvent.ANSWERED: CallState.CLOSED, CallEvent.RESET: CallState.CLOSED},
    CallState.CLOSED: {},
}
"""What is not listed cannot happen."""


class Handler(Protocol):
    """What serves one call. Its methods are called in order, none after the call has ended, and return at once."""

    def message(self, data: bytes) -> None:
        """The next message has come."""

    def input_ended(self) -> None:
        """The client sends no more."""

    def lost(self) -> None:
        """The client or the connection is gone: nothing can be said any more."""


class Call:
    """One call. `send` and `finish` may be called at any time; once it has ended they do nothing."""

    __slots__ = (
        "_began", "_connection", "_ending", "_need", "_partial", "_paused", "_sent", "_taken", "allowance", "handler",
        "queue", "state", "stream",
    )  # fmt: skip

    def __init__(self, connection: Connection, stream: int) -> None:
        self.stream = stream
        self.state = CallState.OPEN
        self.handler: Handler
        self.allowance = 0
        """Bytes that may be sent beyond the connection's initial window; negative: so many have been sent of it."""
        self.queue: list[bytes] = []
        """Bytes of messages that no window allows yet."""
        self._sent = 0
        """Bytes of the first of `queue` that have been sent."""
        self._connection = connection
        self._began = False
        self._ending: bytes | None = None
        """The trailers that follow `queue`."""
        self._partial = bytearray()
        """What has come of a message that is not whole, of the `_need` bytes to look at next."""
        self._need = 0
        self._taken = 0
        """Bytes that have come and that the client does not know to be taken."""
        self._paused = False

    def advance(self, event: CallEvent) -> None:
        """Every change of state."""
        self.state = CALL_TRANSITIONS[self.state][event]

    # --- what comes -------------------------------------------------------------------------------------

    def receive(self, data: bytes, size: int) -> None:
        """The content of a DATA frame, which took `size` bytes of the window with its padding."""
        self._taken += size
        if self._taken > WINDOW:
            self._connection.reset(self, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if self._ending is None:
            self._messages(data)
        if self._taken >= WINDOW // 2 and not self._paused and self.state is CallState.OPEN:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self._connection.write(window_update(self.stream, self._taken))
        self._taken = 0

    def pause(self) -> None:
        """Let the client send no more than fits its window, until `resume`."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self._taken >= WINDOW // 2 and self.state is CallState.OPEN:
            self._acknowledge()

    def _messages(self, data: bytes) -> None:
        context = self._connection.context
        if self._partial:
            if len(self._partial) + len(data) < self._need:
                self._hold(data)
                return
            whole = self._partial
            self.drop_partial()
            whole += data
            data = bytes(whole)
        at, end = 0, len(data)
        while end - at >= PREFIX.size:
            compressed, size = PREFIX.unpack_from(data, at)
            if compressed:
                self.fail(Status.UNIMPLEMENTED, "compressed messages are not read")
                return
            if size > context.limits.message:
                largest = context.limits.message
                self.fail(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes, and {largest} are the most")
                return
            stop = at + PREFIX.size + size
            if stop > end:
                self._need = stop - at
                break
            self._handle(data[at + PREFIX.size : stop])
            if self.state is CallState.CLOSED or self._ending is not None:
                return
            at = stop
        else:
            self._need = PREFIX.size
        if at < end:
            self._hold(data[at:])

    def _hold(self, data: bytes) -> None:
        """More has come of a message that is not whole. It is copied together: the pieces may be tiny, and many."""
        context = self._connection.context
        self._partial += data
        context.held += len(data)
        if context.held > context.limits.held:
            self.fail(Status.RESOURCE_EXHAUSTED, "too many bytes of messages are being received")

    def drop_partial(self) -> None:
        """Forget what has come of a message that is not whole."""
        self._connection.context.held -= len(self._partial)
        self._partial = bytearray()

    def _handle(self, message: bytes) -> None:
        try:
            self.handler.message(message)
        except Exception:
            logger.exception("call_failed")
            self.fail(Status.INTERNAL, "the server failed")

    def end_input(self) -> None:
        """The client has said all."""
        self.advance(CallEvent.INPUT_ENDED)
        if self._ending is None:
            self.handler.input_ended()

    # --- what goes --------------------------------------------------------------------------------------

    def send(self, messages: Sequence[bytes]) -> None:
        """Answer these messages."""
        self._write(messages, None)

    def finish(self, status: Status = Status.OK, message: str = "", messages: Sequence[bytes] = ()) -> None:
        """End the call, after these messages, in one write."""
        if self.state is CallState.CLOSED or self._ending is not None:
            return
        alone = not self._began and not messages
        self._write(messages, trailers(status, message, alone=alone))

    def fail(self, status: Status, message: str) -> None:
        """End the call for a reason that its handler does not know."""
        ended = self.state is CallState.CLOSED or self._ending is not None
        self.finish(status, message)
        if not ended:
            self.handler.lost()

    def _write(self, messages: Sequence[bytes], ending: bytes | None) -> None:
        if self.state is CallState.CLOSED or self._ending is not None:
            return
        connection = self._connection
        parts: list[bytes] = []
        if messages:
            if not self._began:
                self._began = True
                parts.append(frame(Kind.HEADERS, END_HEADERS, self.stream, BEGINNING))
            body = b"".join([part for each in messages for part in (PREFIX.pack(0, len(each)), each)])
            connection.context.held += len(body)
            self.queue.append(body)
            self._drain(parts)
        if ending is not None:
            if self.queue:
                self._ending = ending
            else:
                self._end(parts, ending)
        if parts:
            connection.write(b"".join(parts))
        if self.queue:
            connection.wait(self)

    def _drain(self, parts: list[bytes]) -> None:
        """Take of `queue` what may be sent now, in frames."""
        connection = self._connection
        if connection.paused:
            return
        context, largest = connection.context, connection.largest_frame
        while self.queue:
            body, at = self.queue[0], self._sent
            room = connection.initial_window + self.allowance
            size = min(len(body) - at, largest, room, connection.send_window)
            if size <= 0:
                return
            parts.append(HEAD.pack(size >> 16, size & 0xFFFF, Kind.DATA, 0, self.stream))
            self.allowance -= size
            connection.send_window -= size
            context.held -= size
            if at + size == len(body):
                parts.append(body[at:] if at else body)
                del self.queue[0]
                self._sent = 0
            else:
                parts.append(body[at : at + size])
                self._sent += size

    def _end(self, parts: list[bytes], ending: bytes) -> None:
        """The trailers; and a client that has not ended its side is told that nobody listens (section 8.1)."""
        stream = self.stream
        parts.append(frame(Kind.HEADERS, END_HEADERS | END_STREAM, stream, ending))
        if self.state is CallState.OPEN:
            parts.append(reset(stream, ErrorCode.NO_ERROR))
        self.advance(CallEvent.ANSWERED)
        self._connection.forget(self)

    def flush(self) -> bool:
        """Send of `queue` what may be sent now. Returns whether it is empty."""
        parts: list[bytes] = []
        self._drain(parts)
        done = not self.queue
        if done and self._ending is not None:
            self._end(parts, self._ending)
        if parts:
            self._connection.write(b"".join(parts))
        return done

    def drop_queue(self) -> None:
        """Forget what was not sent."""
        self._connection.context.held -= sum(map(len, self.queue)) - self._sent
        self.queue, self._sent = [], 0
