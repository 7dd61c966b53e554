"""A gRPC connection without a socket, its client written out in frames, and a handler that notes what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpack import Decoder, Encoder

from runtime.grpc.call import Call
from runtime.grpc.connection import Connection
from runtime.grpc.context import GrpcContext, GrpcLimits
from runtime.grpc.frames import HEAD, HEAD_SIZE, PREFACE, PREFIX, SETTING, Kind, frame

PATH = "/test.Service/Method"
FIELDS = (
    (":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x"), ("te", "trailers"),
    ("content-type", "application/grpc"),
)  # fmt: skip


class Notes:
    """A handler that notes what it is told, and answers each message by `answer`."""

    def __init__(self, call: Call, answer: Callable[[Call, bytes], None]) -> None:
        self.call = call
        self.messages: list[bytes] = []
        self.ended = 0
        self.lost_calls = 0
        self._answer = answer

    def message(self, data: bytes) -> None:
        assert not self.lost_calls
        self.messages.append(data)
        self._answer(self.call, data)

    def input_ended(self) -> None:
        self.ended += 1

    def lost(self) -> None:
        self.lost_calls += 1


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_extra_info(self, name: str) -> Any:
        return None

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


@dataclass
class Peer:
    """A client's end of a connection. Everything that it sends must be sent inside an event loop."""

    answer: Callable[[Call, bytes], None] = lambda call, data: None
    limits: GrpcLimits = field(default_factory=GrpcLimits)
    settings: dict[int, int] = field(default_factory=dict)
    greet: bool = True
    beside: Peer | None = None
    """Another client of the same server."""

    def __post_init__(self) -> None:
        self.handlers: list[Notes] = []
        self.transport = Transport()
        self.context = self.beside.context if self.beside else GrpcContext({PATH.encode(): self._open}, self.limits)
        self.connection = Connection(self.context, asyncio.get_running_loop())
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]  # all that is used of one
        self.encoder = Encoder()
        self._decoder = Decoder()
        if self.greet:
            self.send(PREFACE + self.stated())
            self.sent()

    def stated(self) -> bytes:
        """Its SETTINGS."""
        return frame(Kind.SETTINGS, 0, 0, b"".join(SETTING.pack(*each) for each in self.settings.items()))

    def _open(self, call: Call) -> Notes:
        notes = Notes(call, self.answer)
        self.handlers.append(notes)
        return notes

    def send(self, data: bytes) -> None:
        """The bytes come, and the connection has as many turns as it needs for them."""
        self.connection.data_received(data)
        while self.connection.resting and not self.transport.closed:
            self.connection.go_on()

    def headers(self, stream: int, *, end: bool = False, fields: Sequence[tuple[str, str]] = FIELDS) -> bytes:
        return frame(Kind.HEADERS, 4 | end, stream, self.encoder.encode(fields))

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of the frames that have come since the last call."""
        self.connection.write_out()
        data, self.transport.written = self.transport.written, b""
        return list(frames(data))

    def fields(self, block: bytes) -> dict[str, str]:
        return dict(self._decoder.decode(block))

    def goodbye(self) -> int | None:
        """The error code with which the connection was ended."""
        codes = [payload[4:8] for kind, _, _, payload in self.sent() if kind == Kind.GOAWAY]
        return int.from_bytes(codes[-1], "big") if codes else None

    def nothing_is_held(self) -> bool:
        """After the connection is lost, nothing is left of it."""
        self.connection.connection_lost(None)
        return not (self.context.calls or self.context.held or self.context.connections or self.connection.calls)


def data(stream: int, *messages: bytes, end: bool = False) -> bytes:
    """A DATA frame with these messages."""
    content = b"".join(PREFIX.pack(0, len(each)) + each for each in messages)
    return frame(Kind.DATA, end, stream, content)


def frames(written: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    at = 0
    while at < len(written):
        high, low, kind, flags, stream = HEAD.unpack_from(written, at)
        stop = at + HEAD_SIZE + (high << 16 | low)
        assert stop <= len(written)
        yield kind, flags, stream, written[at + HEAD_SIZE : stop]
        at = stop


def messages_in(content: bytes) -> list[bytes]:
    """The messages of a stream's whole DATA."""
    found = []
    while content:
        _, size = PREFIX.unpack_from(content)
        found.append(content[5 : 5 + size])
        content = content[5 + size :]
    return found
