"""Frames of HTTP/2 (RFC 9113) and what gRPC writes into them (grpc/doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from urllib.parse import quote

from hpack import Encoder, NeverIndexedHeaderTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first."""
HEAD = Struct(">BHBBL")
"""A frame's head: its payload's length (a byte and two), kind, flags, stream."""
HEAD_SIZE = HEAD.size
PREFIX = Struct(">BL")
"""What stands before a message: whether it is compressed, and its length."""
NUMBER = Struct(">L")
SETTING = Struct(">HL")


class Kind(IntEnum):
    """Kinds of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 0x1, 0x4, 0x5
ENABLE_PUSH, MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 0x2, 0x3, 0x6
"""Settings."""
DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
SMALLEST_FRAME, LARGEST_FRAME = 2**14, 2**24 - 1
"""Bounds of MAX_FRAME_SIZE; the first is also what holds until the other side states another."""
LAST_STREAM = 2**31 - 1


class ErrorCode(IntEnum):
    """Of RST_STREAM and GOAWAY."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class Status(IntEnum):
    """How a call ends (grpc/doc/statuscodes.md)."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Broken(Exception):
    """The client broke HTTP/2 so that the connection must end."""

    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    size = len(payload)
    return HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def unpadded(payload: bytes, skipped: int, *, padded: bool = True) -> bytes:
    """The content of a frame with padding, without its first `skipped` bytes."""
    padding = payload[0] if padded and payload else 0
    start = skipped + padded
    if (padded and not payload) or start + padding > len(payload):
        raise Broken(ErrorCode.PROTOCOL_ERROR, "more padding than there is in the frame")
    return payload[start : len(payload) - padding]


def window_update(stream: int, size: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, 0, stream, NUMBER.pack(size))


def reset(stream: int, code: ErrorCode) -> bytes:
    return frame(Kind.RST_STREAM, 0, stream, NUMBER.pack(code))


def go_away(last: int, code: ErrorCode, why: str = "") -> bytes:
    return frame(Kind.GOAWAY, 0, 0, NUMBER.pack(last) + NUMBER.pack(code) + why.encode())


def _block(*fields: tuple[str, str]) -> bytes:
    """A header block that neither needs nor changes what was sent before: no encoder is kept."""
    return Encoder().encode([NeverIndexedHeaderTuple(*field) for field in fields], huffman=False)


_BEGINNING = ((":status", "200"), ("content-type", "application/grpc"))
BEGINNING = _block(*_BEGINNING)
"""Headers of an answer with messages."""
SUCCESS = _block(("grpc-status", "0"))
"""Trailers of an answer that is complete."""
NO_GRPC = _block((":status", "415"))
"""The whole answer to what is no call of gRPC."""
MOST_EXPLAINED = 1000
"""Characters of an explanation."""


def trailers(status: Status, message: str, *, alone: bool) -> bytes:
    """The header block that ends a call; `alone`: nothing was sent before."""
    if status is Status.OK and not alone:
        return SUCCESS
    fields = [("grpc-status", str(int(status)))]
    if message:
        fields.append(("grpc-message", quote(message[:MOST_EXPLAINED], safe=" !#$&'()*+,/:;<=>?@[]^`{|}~\"\\")))
    return _block(*(_BEGINNING if alone else ()), *fields)
