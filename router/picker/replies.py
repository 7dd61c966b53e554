"""What the picker answers on an ext_proc stream, as bytes on the wire. Constant replies are encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from google.protobuf.struct_pb2 import Struct, Value

from kvcache.errors import ApiError
from router.picker.endpoints import DESTINATION, METADATA
from router.picker.protocol import (
    OVERWRITE,
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HeaderValue,
    HeaderValueOption,
    HttpStatus,
    ImmediateResponse,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)
from runtime.http.context import Headers

DETAILS = "picker_"
"""The picker's own answers carry why in the gateway's log, behind this."""
PIECE = 62_000
"""Most bytes of a body in one message: Envoy refuses larger ones than 64 KiB."""

REQUEST_HEADERS = ProcessingResponse(request_headers=HeadersResponse()).SerializeToString()
REQUEST_BODY = ProcessingResponse(request_body=BodyResponse()).SerializeToString()
REQUEST_TRAILERS = ProcessingResponse(request_trailers=TrailersResponse()).SerializeToString()
RESPONSE_HEADERS = ProcessingResponse(response_headers=HeadersResponse()).SerializeToString()
RESPONSE_BODY = ProcessingResponse(response_body=BodyResponse()).SerializeToString()
RESPONSE_TRAILERS = ProcessingResponse(response_trailers=TrailersResponse()).SerializeToString()


def mutation(headers: Headers) -> Any:
    """These headers replace what there is."""
    return HeaderMutation(
        set_headers=[
            HeaderValueOption(header=HeaderValue(key=name.decode("latin-1"), raw_value=value), append_action=OVERWRITE)
            for name, value in headers
        ]
    )


def destination(endpoints: str) -> Struct:
    """The dynamic metadata that names the endpoints."""
    chosen = Struct(fields={DESTINATION: Value(string_value=endpoints)})
    return Struct(fields={METADATA: Value(struct_value=chosen)})


def _wire(reply: Any) -> bytes:
    encoded: bytes = reply.SerializeToString()
    return encoded


def routed(endpoints: str, headers: Headers) -> bytes:
    """The answer to a request's headers: where it goes."""
    common = CommonResponse(header_mutation=mutation(headers), clear_route_cache=True)
    return _wire(
        ProcessingResponse(request_headers=HeadersResponse(response=common), dynamic_metadata=destination(endpoints))
    )


def routed_by_body(endpoints: str, headers: Headers, body: bytes | None) -> bytes:
    """The answer to a buffered body: where the request goes, and its new body, if it has one."""
    common = CommonResponse(header_mutation=mutation(headers), clear_route_cache=True)
    if body is not None:
        common.body_mutation.body = body
    return _wire(
        ProcessingResponse(request_body=BodyResponse(response=common), dynamic_metadata=destination(endpoints))
    )


def _streamed(piece: bytes, *, last: bool) -> Any:
    streamed = StreamedBodyResponse(body=piece, end_of_stream=last)
    return BodyResponse(response=CommonResponse(body_mutation=BodyMutation(streamed_response=streamed)))


def request_pieces(body: bytes, *, last: bool) -> Iterator[bytes]:
    """The whole body back; its last piece ends the request if `last`, otherwise trailers do."""
    for at in range(0, max(len(body), 1), PIECE):
        ends = last and at + PIECE >= len(body)
        yield _wire(ProcessingResponse(request_body=_streamed(body[at : at + PIECE], last=ends)))


def response_pieces(body: bytes, *, last: bool) -> Iterator[bytes]:
    """A piece of the answer's body back."""
    for at in range(0, max(len(body), 1), PIECE):
        ends = last and at + PIECE >= len(body)
        yield _wire(ProcessingResponse(response_body=_streamed(body[at : at + PIECE], last=ends)))


def response_headers(headers: Headers) -> bytes:
    """The answer's headers, with these in addition."""
    common = CommonResponse(header_mutation=mutation(headers))
    return _wire(ProcessingResponse(response_headers=HeadersResponse(response=common)))


def immediate(error: ApiError, headers: Iterable[tuple[bytes, bytes]], details: str) -> bytes:
    """An answer to the client in place of a worker's."""
    fields = [(b"content-type", b"application/json"), *headers]
    return _wire(
        ProcessingResponse(
            immediate_response=ImmediateResponse(
                status=HttpStatus(code=error.status),
                headers=mutation(fields),
                body=orjson.dumps(error.body()),
                details=DETAILS + details,
            )
        )
    )
