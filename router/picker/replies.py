"""What the picker answers on an ext_proc stream, as bytes on the wire.

Written by hand: the objects of `google.protobuf` would take longer than all that gRPC does for a request. The tests
compare them with what its classes write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import orjson

from kvcache.errors import ApiError
from router.picker.endpoints import DESTINATION, METADATA
from router.picker.protocol import OVERWRITE
from runtime.http.context import Headers

DETAILS = "picker_"
"""The picker's own answers carry why in the gateway's log, behind this."""
PIECE = 62_000
"""Most bytes of a body in one message: Envoy refuses larger ones than 64 KiB."""


def _number(number: int, value: int) -> bytes:
    """A field that is a number or a truth value, as Protocol Buffers write it."""
    return _varint(number << 3) + _varint(value)


def _field(number: int, data: bytes) -> bytes:
    """A field that is a string, bytes or a message."""
    size = len(data)
    if size < 128 and number < 16:
        return b"%c%c%b" % (number << 3 | 2, size, data)
    return _varint(number << 3 | 2) + _varint(size) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


# Numbers of fields, from Envoy's external_processor.proto, base.proto and struct.proto of Protocol Buffers.
_REQUEST_HEADERS, _RESPONSE_HEADERS, _REQUEST_BODY, _RESPONSE_BODY, _REQUEST_TRAILERS, _RESPONSE_TRAILERS = range(1, 7)
_IMMEDIATE, _DYNAMIC_METADATA = 7, 8
_RESPONSE = 1  # of HeadersResponse, BodyResponse
_HEADER_MUTATION, _BODY_MUTATION, _CLEAR_ROUTE_CACHE = 2, 3, 5  # of CommonResponse
_SET_HEADERS, _REMOVE_HEADERS = 1, 2  # of HeaderMutation
_HEADER, _APPEND_ACTION = 1, 3  # of HeaderValueOption
_KEY, _RAW_VALUE = 1, 3  # of HeaderValue
_WHOLE, _STREAMED = 1, 3  # of BodyMutation
_BODY, _END_OF_STREAM = 1, 2  # of StreamedBodyResponse
_FIELDS, _NAME, _VALUE, _STRING, _STRUCT = 1, 1, 2, 3, 5  # of Struct, its entries and Value
_STATUS, _HEADERS, _ERROR_BODY, _DETAILS, _CODE = 1, 2, 3, 5, 1  # of ImmediateResponse and HttpStatus

REQUEST_HEADERS = _field(_REQUEST_HEADERS, b"")
REQUEST_BODY = _field(_REQUEST_BODY, b"")
REQUEST_TRAILERS = _field(_REQUEST_TRAILERS, b"")
RESPONSE_HEADERS = _field(_RESPONSE_HEADERS, b"")
RESPONSE_BODY = _field(_RESPONSE_BODY, b"")
RESPONSE_TRAILERS = _field(_RESPONSE_TRAILERS, b"")

_REPLACES = _number(_APPEND_ACTION, OVERWRITE)
_CLEARS = _number(_CLEAR_ROUTE_CACHE, 1)
_ENDS = _number(_END_OF_STREAM, 1)


def _mutation(headers: Iterable[tuple[bytes, bytes]], removed: Iterable[bytes] = ()) -> bytes:
    """`HeaderMutation`: these headers replace what there is, and those go."""
    fields = [
        _field(_SET_HEADERS, _field(_HEADER, _field(_KEY, name) + _field(_RAW_VALUE, value)) + _REPLACES)
        for name, value in headers
    ]
    fields += [_field(_REMOVE_HEADERS, name) for name in removed]
    return b"".join(fields)


def _entry(name: str, value: bytes) -> bytes:
    """`Struct` with one field."""
    return _field(_FIELDS, _field(_NAME, name.encode()) + _field(_VALUE, value))


def _destination(endpoints: str) -> bytes:
    """The dynamic metadata that names the endpoints."""
    chosen = _entry(DESTINATION, _field(_STRING, endpoints.encode()))
    return _field(_DYNAMIC_METADATA, _entry(METADATA, _field(_STRUCT, chosen)))


def routed(endpoints: str, headers: Headers, removed: Iterable[bytes] = ()) -> bytes:
    """The answer to a request's headers: where it goes."""
    common = _field(_HEADER_MUTATION, _mutation(headers, removed)) + _CLEARS
    return _field(_REQUEST_HEADERS, _field(_RESPONSE, common)) + _destination(endpoints)


def routed_by_body(endpoints: str, headers: Headers, body: bytes | None, removed: Iterable[bytes] = ()) -> bytes:
    """The answer to a buffered body: where the request goes, and its new body, if it has one."""
    common = _field(_HEADER_MUTATION, _mutation(headers, removed))
    if body is not None:
        common += _field(_BODY_MUTATION, _field(_WHOLE, body))
    return _field(_REQUEST_BODY, _field(_RESPONSE, common + _CLEARS)) + _destination(endpoints)


def _pieces(number: int, body: bytes, *, last: bool) -> Iterator[bytes]:
    for at in range(0, max(len(body), 1), PIECE):
        piece = body[at : at + PIECE]
        streamed = _field(_BODY, piece) if piece else b""
        if last and at + PIECE >= len(body):
            streamed += _ENDS
        yield _field(number, _field(_RESPONSE, _field(_BODY_MUTATION, _field(_STREAMED, streamed))))


def request_pieces(body: bytes, *, last: bool) -> Iterator[bytes]:
    """The whole body back; its last piece ends the request if `last`, otherwise trailers do."""
    return _pieces(_REQUEST_BODY, body, last=last)


def response_pieces(body: bytes, *, last: bool) -> Iterator[bytes]:
    """A piece of the answer's body back."""
    return _pieces(_RESPONSE_BODY, body, last=last)


def response_headers(headers: Headers) -> bytes:
    """The answer's headers, with these in addition."""
    return _field(_RESPONSE_HEADERS, _field(_RESPONSE, _field(_HEADER_MUTATION, _mutation(headers))))


def immediate(error: ApiError, headers: Iterable[tuple[bytes, bytes]], details: str) -> bytes:
    """An answer to the client in place of a worker's."""
    fields = [(b"content-type", b"application/json"), *headers]
    return _field(
        _IMMEDIATE,
        _field(_STATUS, _number(_CODE, error.status))
        + _field(_HEADERS, _mutation(fields))
        + _field(_ERROR_BODY, orjson.dumps(error.body()))
        + _field(_DETAILS, (DETAILS + details).encode()),
    )
