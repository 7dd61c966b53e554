"""The header blocks of a client: put together, decoded (HPACK, RFC 7541), and judged."""

from __future__ import annotations

from dataclasses import dataclass

from hpack import Decoder, HPACKError

from runtime.grpc.frames import Broken, ErrorCode

TABLE = 4096
"""Bytes of the table of header fields that a client may make us keep."""
KNOWN = 64
"""Header blocks whose meaning is remembered."""
FIELD = 32
"""Bytes that a field, or a piece of a block, counts for beside its content (RFC 7541, section 4.1): many empty ones are
not small."""
_OF_CONNECTIONS = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


@dataclass(frozen=True, slots=True)
class Request:
    """What a header block asks for."""

    path: bytes
    valid: bool
    """As section 8.3.1 demands."""
    of_grpc: bool

    @classmethod
    def of(cls, fields: list[tuple[bytes, bytes]]) -> Request:
        stated = [name for name, _ in fields if name.startswith(b":")]
        named = dict(fields)
        valid = (
            len(set(stated)) == len(stated)
            and set(stated) - {b":authority"} == {b":method", b":scheme", b":path"}
            and [name for name, _ in fields[: len(stated)]] == stated
            and all(name and name == name.lower() and name not in _OF_CONNECTIONS for name in named)
            and named.get(b"te", b"trailers") == b"trailers"
        )
        of_grpc = named.get(b":method") == b"POST" and named.get(b"content-type", b"").startswith(b"application/grpc")
        return cls(named.get(b":path", b""), valid, of_grpc)


class HeaderBlocks:
    """Those of one connection, in order. Nothing is decoded twice: a client that asks the same again and again sends
    the same few bytes, which name fields of the table, and they mean the same as long as the table stays as it is."""

    def __init__(self, largest: int) -> None:
        """`largest`: bytes of a block, encoded and decoded."""
        self._largest = largest
        self._decoder = Decoder(largest)
        self._decoder.max_allowed_table_size = TABLE
        self._known: dict[bytes, Request] = {}
        """Blocks that change nothing in the table."""
        self._pieces: list[bytes] = []
        """Of a block that goes on in CONTINUATION frames."""
        self._size = 0
        self._begun = (0, 0)
        """Stream and flags of the frame in which it began."""

    @property
    def unfinished(self) -> bool:
        """Only a CONTINUATION frame may come now."""
        return bool(self._pieces)

    def begin(self, flags: int, stream: int, piece: bytes) -> None:
        """A block that goes on."""
        self._pieces, self._begun, self._size = [piece], (stream, flags), len(piece)

    def go_on(self, stream: int, piece: bytes, *, last: bool) -> tuple[bytes | None, int]:
        """The whole block, once it is there, and the flags of its first frame. Raises `Broken`."""
        begun, flags = self._begun
        if not self._pieces or stream != begun:
            raise Broken(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION of nothing")
        self._pieces.append(piece)
        self._size += len(piece) + FIELD
        if self._size > self._largest:
            raise Broken(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too large")
        if not last:
            return None, flags
        block, self._pieces = b"".join(self._pieces), []
        return block, flags

    def decoded(self, block: bytes) -> Request:
        """What a whole block asks for. Raises `Broken`."""
        if len(block) > self._largest:
            raise Broken(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too large")
        known = self._known.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table.dynamic_entries
        before, first = len(table), table[0] if table else None
        try:
            request = Request.of([(name, value) for name, value in self._decoder.decode(block, raw=True)])
        except (HPACKError, UnicodeError):
            raise Broken(ErrorCode.COMPRESSION_ERROR, "a header block that cannot be read") from None
        resizes = block[:1] and block[0] & 0xE0 == 0x20
        if resizes or before != len(table) or first is not (table[0] if table else None):
            self._known.clear()
        elif len(self._known) < KNOWN:
            self._known[block] = request
        return request
