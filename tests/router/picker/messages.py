"""Messages as a gateway sends them, and what the replies say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.picker.endpoints import DESTINATION, METADATA, SUBSET, SUBSET_METADATA
from router.picker.protocol import (
    BodyMode,
    HeaderMap,
    HeaderValue,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProtocolConfiguration,
)
from tests.router.picker.responses import ProcessingResponse

NO_HINT = object()


def _headers(fields: dict[str, str], *, end: bool) -> Any:
    pairs = [HeaderValue(key=name, raw_value=value.encode()) for name, value in fields.items()]
    return HttpHeaders(headers=HeaderMap(headers=pairs), end_of_stream=end)


def request_headers(
    method: str = "POST",
    path: str = "/v1/completions",
    *,
    end: bool = False,
    mode: BodyMode | None = None,
    subset: Any = NO_HINT,
    **fields: str,
) -> Any:
    """The first message. `subset`: a JSON value for the hint."""
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    message = ProcessingRequest(request_headers=_headers({":method": method, ":path": path, **named}, end=end))
    if mode is not None:
        config = ProtocolConfiguration(request_body_mode=mode, response_body_mode=mode)
        message.protocol_config.CopyFrom(config)
    if subset is not NO_HINT:
        entry = message.metadata_context.filter_metadata.add(key=SUBSET_METADATA)
        entry.value.update({SUBSET: subset})
    return message


def request_body(body: bytes, *, end: bool = True) -> Any:
    return ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=end))


def request_trailers() -> Any:
    return ProcessingRequest(request_trailers=HttpTrailers())


def response_headers(status: int = 200, served: str = "", *, end: bool = False, **fields: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    message = ProcessingRequest(response_headers=_headers({":status": str(status), **named}, end=end))
    if served:
        entry = message.metadata_context.filter_metadata.add(key=METADATA)
        entry.value.update({DESTINATION + "-served": served})
    return message


def response_body(body: bytes, *, end: bool = False) -> Any:
    return ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=end))


def parsed(replies: Sequence[bytes]) -> list[Any]:
    return [ProcessingResponse.FromString(reply) for reply in replies]


def kinds(replies: Sequence[bytes]) -> list[str]:
    return [reply.WhichOneof("kind") for reply in parsed(replies)]


def chosen(replies: Sequence[bytes]) -> str:
    """The endpoints that the replies name."""
    return next(destination(each) for each in parsed(replies) if METADATA in each.dynamic_metadata)


def set_headers(reply: Any) -> dict[str, str]:
    """What the reply sets, whichever kind it is."""
    match kind := reply.WhichOneof("kind"):
        case "immediate_response":
            mutation = reply.immediate_response.headers
        case _:
            mutation = getattr(reply, kind).response.header_mutation
    return {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}


def destination(reply: Any) -> str:
    """The endpoints in the metadata."""
    found: str = reply.dynamic_metadata[METADATA][DESTINATION]
    return found


def streamed(replies: Sequence[bytes], kind: str = "request_body") -> list[tuple[bytes, bool]]:
    """The pieces of a body that are sent back, and whether each is the last."""
    pieces = [
        getattr(each, kind).response.body_mutation.streamed_response
        for each in parsed(replies)
        if each.WhichOneof("kind") == kind
    ]
    return [(piece.body, piece.end_of_stream) for piece in pieces]
