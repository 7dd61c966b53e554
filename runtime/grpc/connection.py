"""One HTTP/2 connection of a gRPC client: frames, windows, header blocks. RFC 9113, as far as gRPC needs it.

Not spoken: push, priorities (both optional), and gRPC's compression. A call's deadline is its client's to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from runtime.grpc.call import WINDOW, Call, CallEvent, CallState
from runtime.grpc.context import GrpcContext
from runtime.grpc.frames import (
    ACK,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    HEAD,
    HEAD_SIZE,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    LAST_STREAM,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    NO_GRPC,
    NUMBER,
    PADDED,
    PREFACE,
    SETTING,
    SMALLEST_FRAME,
    WITH_PRIORITY,
    Broken,
    ErrorCode,
    Kind,
    Status,
    frame,
    go_away,
    reset,
    unpadded,
    window_update,
)
from runtime.grpc.headers import TABLE, HeaderBlocks, Request
from runtime.logs import EventLogger

logger = EventLogger(__name__)

CONNECTION_WINDOW = 2**24
FRAME = 2**16
"""Payload that a client may put into one frame."""
FRAMES = 256
"""That are dealt with before other connections have their turn: one read may bring many thousands."""


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, context: GrpcContext, loop: asyncio.AbstractEventLoop, refusal: str = "") -> None:
        """`refusal`: why the client is sent away once it has greeted, whatever it asks for."""
        self.context = context
        self._refusal = refusal
        self.calls: dict[int, Call] = {}
        self.send_window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        """Of each call: what may be sent before the client says that it has taken some of it."""
        self.largest_frame = SMALLEST_FRAME
        self._loop = loop
        self._transport: asyncio.Transport
        self._buffer = b""
        self._greeted = False
        self._blocks = HeaderBlocks(context.limits.metadata)
        self._last = 0
        """The highest stream that the client has opened."""
        self._taken = 0
        """Bytes that have come and that the client does not know to be taken."""
        self._waiting: dict[int, Call] = {}
        """Calls that have more to send than the windows allow."""
        self._room = False
        """There may be room for what waits: it is looked for once what has come is read."""
        self.paused = False
        self._unread = 0
        """Bytes that were written while the client did not read."""
        self._closed = False
        self._leaving = False
        """The client has been asked to open no more calls."""
        self._left = False
        """The client knows, and asks elsewhere."""
        self._timer: asyncio.TimerHandle | None = None
        self._writes: list[bytes] = []
        """What is written together: all that is said to what came in one read, or in one turn of the event loop."""
        self._receiving = False
        self.resting = False
        """There is more to deal with, once other connections have had their turn."""

    # --- transport --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # that of a stream
        with contextlib.suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        context, limits = self.context, self.context.limits
        if not context.make_room():
            self.write(frame(Kind.SETTINGS, 0, 0))  # must come first
            self._dismiss(ErrorCode.ENHANCE_YOUR_CALM, "too many connections are open")
            return
        context.connections.add(self)
        context.idle.add(self, self._loop)
        stated = {
            HEADER_TABLE_SIZE: TABLE, MAX_CONCURRENT_STREAMS: limits.calls, INITIAL_WINDOW_SIZE: WINDOW,
            MAX_FRAME_SIZE: FRAME, MAX_HEADER_LIST_SIZE: limits.metadata,
        }  # fmt: skip
        settings = b"".join(SETTING.pack(*each) for each in stated.items())
        self.write(frame(Kind.SETTINGS, 0, 0, settings) + window_update(0, CONNECTION_WINDOW - DEFAULT_WINDOW))
        self._timer = self._loop.call_later(limits.greeting, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._set_timer(None)
        for call in list(self.calls.values()):
            self._lose(call)
        self.context.idle.discard(self)
        self.context.connections.closed(self)

    def pause_writing(self) -> None:
        self.paused = True
        if self._greeted:
            self._set_timer(self.context.limits.write)

    def resume_writing(self) -> None:
        self.paused = False
        self._unread = 0
        if self._greeted and not self._closed:
            self._set_timer(None)
        self._flush()

    def _set_timer(self, seconds: float | None) -> None:
        """Give up the connection after so many seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self.abort)

    def abort(self) -> None:
        """Cut the connection."""
        self._closed = True
        self._transport.abort()

    def write(self, data: bytes) -> None:
        if self._closed:
            return
        if not self._writes and not self._receiving:
            self._loop.call_soon(self.write_out)
        if self.paused:
            self._unread += len(data)
        self._writes.append(data)

    def write_out(self) -> None:
        """Give the transport what has been written."""
        if self._writes:
            data, self._writes = b"".join(self._writes), []
            self._transport.write(data)

    # --- frames -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self.resting:
            self._buffer = data
            return
        self._receiving = True
        try:
            self._receive(data)
        except Broken as broken:
            logger.debug("connection_broken", why=str(broken))
            self.write(go_away(self._last, broken.code, str(broken)))
            self._close()
        self._receiving = False
        self.write_out()

    def _rest(self) -> None:
        self.resting = True
        self._transport.pause_reading()
        self._loop.call_soon(self.go_on)

    def go_on(self) -> None:
        """Deal with more of what has come."""
        if self.resting and not self._closed:
            self.resting = False
            self._transport.resume_reading()
            self.data_received(b"")

    def _receive(self, data: bytes) -> None:
        at = 0
        if not self._greeted:
            if not data.startswith(PREFACE):
                if not PREFACE.startswith(data):
                    raise Broken(ErrorCode.PROTOCOL_ERROR, "this port speaks HTTP/2 with prior knowledge")
                self._buffer = data
                return
            if self._refusal:
                raise Broken(ErrorCode.PROTOCOL_ERROR, self._refusal)
            self._greeted = True
            self._set_timer(None)
            at = len(PREFACE)
        self._frames(data, at)

    def _frames(self, data: bytes, at: int) -> None:
        """The frames in `data` from `at` on. The last one may go on in what comes next."""
        end, left = len(data), FRAMES
        while end - at >= HEAD_SIZE:
            if not left:
                self._rest()
                break
            left -= 1
            high, low, kind, flags, stream = HEAD.unpack_from(data, at)
            size = high << 16 | low
            if size > FRAME:
                raise Broken(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            stop = at + HEAD_SIZE + size
            if stop > end:
                break
            self._frame(kind, flags, stream & LAST_STREAM, data[at + HEAD_SIZE : stop])
            if self._closed:
                return
            if self._unread > self.context.limits.unread:
                raise Broken(ErrorCode.ENHANCE_YOUR_CALM, "answers are asked for, and not read")
            at = stop
        if at < end:
            self._buffer = data[at:]
        if self._room:
            self._room = False
            self._flush()
        if self._taken >= CONNECTION_WINDOW // 2:
            self.write(window_update(0, self._taken))
            self._taken = 0

    def _close(self) -> None:
        self._closed = True
        self.write_out()
        self._transport.close()
        self._set_timer(self.context.limits.greeting)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._blocks.unfinished and kind != Kind.CONTINUATION:
            raise Broken(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted")
        match kind:
            case Kind.DATA:
                self._data(flags, stream, payload)
            case Kind.HEADERS:
                self._headers(flags, stream, payload)
            case Kind.CONTINUATION:
                block, before = self._blocks.go_on(stream, payload, last=bool(flags & END_HEADERS))
                if block is not None:
                    self._whole_block(before, stream, block)
            case Kind.WINDOW_UPDATE:
                self._window_updated(stream, payload)
            case Kind.RST_STREAM:
                self._was_reset(stream, payload)
            case Kind.SETTINGS:
                self._settings(flags, stream, payload)
            case Kind.PING:
                self._ping(flags, stream, payload)
            case Kind.GOAWAY:
                if stream or len(payload) < 2 * NUMBER.size:
                    raise Broken(ErrorCode.PROTOCOL_ERROR if stream else ErrorCode.FRAME_SIZE_ERROR, "a bad GOAWAY")
            case Kind.PRIORITY:
                if not stream:
                    raise Broken(ErrorCode.PROTOCOL_ERROR, "the connection has no priority")
                if len(payload) != 5:
                    self.write(reset(stream, ErrorCode.FRAME_SIZE_ERROR))
            case Kind.PUSH_PROMISE:
                raise Broken(ErrorCode.PROTOCOL_ERROR, "clients push nothing")
            case _:
                pass  # extensions are to be ignored

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self._taken += size
        if self._taken > CONNECTION_WINDOW:
            raise Broken(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window allows")
        if flags & PADDED:
            payload = unpadded(payload, 0)
        call = self.calls.get(stream)
        if call is None:
            self._closed_stream(stream, "DATA")
            return
        if call.state is not CallState.OPEN:
            self.reset(call, ErrorCode.STREAM_CLOSED)
            return
        if size:
            call.receive(payload, size)
        if flags & END_STREAM and call.state is CallState.OPEN:
            call.end_input()

    def _closed_stream(self, stream: int, what: str) -> None:
        """What comes on a stream that has been ended here meanwhile is ignored."""
        if stream > self._last or not stream & 1:
            raise Broken(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream}, which is not open")

    def _window_updated(self, stream: int, payload: bytes) -> None:
        if len(payload) != NUMBER.size:
            raise Broken(ErrorCode.FRAME_SIZE_ERROR, "a bad WINDOW_UPDATE")
        size = NUMBER.unpack(payload)[0] & LARGEST_WINDOW
        if not stream:
            self.send_window += size
            if not size or self.send_window > LARGEST_WINDOW:
                raise Broken(ErrorCode.FLOW_CONTROL_ERROR if size else ErrorCode.PROTOCOL_ERROR, "a bad window")
            self._room = True
            return
        call = self.calls.get(stream)
        if call is None:
            self._closed_stream(stream, "WINDOW_UPDATE")
            return
        call.allowance += size
        if not size or self.initial_window + call.allowance > LARGEST_WINDOW:
            self.reset(call, ErrorCode.FLOW_CONTROL_ERROR if size else ErrorCode.PROTOCOL_ERROR)
        elif call.queue and call.flush():
            self._waiting.pop(stream, None)

    def _was_reset(self, stream: int, payload: bytes) -> None:
        if len(payload) != NUMBER.size:
            raise Broken(ErrorCode.FRAME_SIZE_ERROR, "a bad RST_STREAM")
        if (call := self.calls.get(stream)) is None:
            self._closed_stream(stream, "RST_STREAM")
        else:
            self._lose(call)

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise Broken(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % SETTING.size or (flags & ACK and payload):
            raise Broken(ErrorCode.FRAME_SIZE_ERROR, "bad SETTINGS")
        if flags & ACK:
            return
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > LARGEST_WINDOW:
                    raise Broken(ErrorCode.FLOW_CONTROL_ERROR, "a bad window")
                self.initial_window = value
                self._room = True
            elif name == MAX_FRAME_SIZE:
                if not SMALLEST_FRAME <= value <= LARGEST_FRAME:
                    raise Broken(ErrorCode.PROTOCOL_ERROR, "a bad size of frames")
                self.largest_frame = min(value, FRAME)
            elif name == ENABLE_PUSH and value > 1:
                raise Broken(ErrorCode.PROTOCOL_ERROR, "bad SETTINGS")
        self.write(frame(Kind.SETTINGS, ACK, 0))

    def _ping(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) != 8:
            raise Broken(ErrorCode.PROTOCOL_ERROR if stream else ErrorCode.FRAME_SIZE_ERROR, "a bad PING")
        if not flags & ACK:
            self.write(frame(Kind.PING, ACK, 0, payload))
        elif self._leaving and payload == _LEAVING:
            self._left = True
            self.write(go_away(self._last, ErrorCode.NO_ERROR))
            self._close_if_left()

    # --- header blocks ----------------------------------------------------------------------------------

    def _headers(self, flags: int, stream: int, payload: bytes) -> None:
        if not stream & 1:
            raise Broken(ErrorCode.PROTOCOL_ERROR, f"a client opens no stream {stream}")
        if flags & (PADDED | WITH_PRIORITY):
            payload = unpadded(payload, 5 if flags & WITH_PRIORITY else 0, padded=bool(flags & PADDED))
        if flags & END_HEADERS:
            self._whole_block(flags, stream, payload)
        else:
            self._blocks.begin(flags, stream, payload)

    def _whole_block(self, flags: int, stream: int, block: bytes) -> None:
        request = self._blocks.decoded(block)
        call = self.calls.get(stream)
        if call is not None:
            if call.state is not CallState.OPEN:
                self.reset(call, ErrorCode.STREAM_CLOSED)
            elif not flags & END_STREAM:
                self.reset(call, ErrorCode.PROTOCOL_ERROR)
            else:
                call.end_input()
            return
        if stream <= self._last:
            return  # trailers on a stream that has been ended here
        self._last = stream
        if self._left:
            self.write(reset(stream, ErrorCode.REFUSED_STREAM))
        else:
            self._open(flags, stream, request)

    def _open(self, flags: int, stream: int, request: Request) -> None:
        """A new call."""
        context = self.context
        if not request.valid:
            self.write(reset(stream, ErrorCode.PROTOCOL_ERROR))
            return
        if not request.of_grpc:
            self.write(frame(Kind.HEADERS, END_HEADERS | END_STREAM, stream, NO_GRPC))
            if not flags & END_STREAM:
                self.write(reset(stream, ErrorCode.NO_ERROR))
            return
        call = Call(self, stream)
        if not self.calls:
            context.idle.discard(self)
        self.calls[stream] = call
        context.calls += 1
        method = context.methods.get(request.path)
        if method is None:
            call.finish(Status.UNIMPLEMENTED, "this server has no such method")
        elif context.calls > context.limits.calls:
            call.finish(Status.RESOURCE_EXHAUSTED, "too many calls are open")
        else:
            call.handler = method(call)
            if flags & END_STREAM:
                call.end_input()

    # --- what calls need --------------------------------------------------------------------------------

    def wait(self, call: Call) -> None:
        """The call has more to send than it may."""
        self._waiting[call.stream] = call
        if self.context.held > self.context.limits.held:
            self._loop.call_soon(self.reset, call, ErrorCode.ENHANCE_YOUR_CALM)

    def _flush(self) -> None:
        for call in list(self._waiting.values()):
            if self.paused or self._closed:
                return
            if call.flush():
                self._waiting.pop(call.stream, None)

    def reset(self, call: Call, code: ErrorCode) -> None:
        """End a call without a status."""
        if call.state is not CallState.CLOSED:
            self.write(reset(call.stream, code))
            self._lose(call)

    def _lose(self, call: Call) -> None:
        call.advance(CallEvent.RESET)
        self.forget(call)
        call.handler.lost()

    def forget(self, call: Call) -> None:
        """The call is over."""
        call.drop_partial()
        call.drop_queue()
        self._waiting.pop(call.stream, None)
        if self.calls.pop(call.stream, None) is not None:
            self.context.calls -= 1
            if not self.calls and not self._closed:
                self.context.idle.add(self, self._loop)
        if self._left:
            self._close_if_left()

    # --- the end ----------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Ask the client to open no more calls. Those that it has opened before it knows are served."""
        if self._leaving or self._closed:
            return
        self._leaving = True
        self.write(go_away(LAST_STREAM, ErrorCode.NO_ERROR) + frame(Kind.PING, 0, 0, _LEAVING))

    def _close_if_left(self) -> None:
        if self._left and not self.calls and not self._closed:
            self._loop.call_soon(self._close)

    def retire(self) -> None:
        """It has been idle for long enough: ask the client to leave, or end it if that has been asked before."""
        if self._leaving or self._closed:
            self.abort()
        else:
            self.leave()

    def displace(self) -> None:
        """Make room for another connection, now. A call that is on its way was not looked at, and may be repeated."""
        self._dismiss(ErrorCode.NO_ERROR, "other connections need the room")

    def _dismiss(self, code: ErrorCode, why: str) -> None:
        """Say why, and be gone."""
        self.write(go_away(self._last, code, why))
        self.write_out()
        self.abort()
        self.context.idle.discard(self)
        self.context.connections.closed(self)

    def cut(self) -> None:
        """End every call, and the connection."""
        for call in list(self.calls.values()):
            call.fail(Status.UNAVAILABLE, "the server stops")
        if not self._closed:
            self._close()


_LEAVING = b"kvleave\0"
"""Payload of the PING whose answer says that a client has read the GOAWAY before it."""
