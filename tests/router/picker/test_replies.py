"""The picker's answers on the wire: what is written by hand is what Protocol Buffers write.

Not covered: when which answer is given (test_stream.py), and whether Envoy understands it (tests/envoy).
"""

from __future__ import annotations

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import ApiError
from router.picker import replies
from router.picker.endpoints import DESTINATION, METADATA
from router.picker.protocol import OVERWRITE
from tests.router.picker.responses import ProcessingResponse

NAMES = st.text("abc-", min_size=1, max_size=140).map(str.encode)
HEADERS = st.lists(st.tuples(NAMES, st.binary(min_size=1, max_size=300)), max_size=4)
ENDPOINTS = st.text("0123456789.:,[]", min_size=1, max_size=200)
BODIES = st.one_of(st.binary(max_size=300), st.sampled_from([0, 61_999, 62_000, 62_001, 130_000]).map(bytes))


def _set(headers: list[tuple[bytes, bytes]]) -> dict[str, object]:
    options = [
        {"header": {"key": name.decode(), "raw_value": value}, "append_action": OVERWRITE} for name, value in headers
    ]
    return {"set_headers": options}


def _routed(endpoints: str, **reply: object) -> bytes:
    message = ProcessingResponse(**reply)
    message.dynamic_metadata.update({METADATA: {DESTINATION: endpoints}})
    written: bytes = message.SerializeToString(deterministic=True)
    return written


@given(ENDPOINTS, HEADERS, st.one_of(st.none(), BODIES))
@settings(max_examples=60)
def test_where_a_request_goes(endpoints: str, headers: list[tuple[bytes, bytes]], body: bytes | None) -> None:
    common: dict[str, object] = {"header_mutation": _set(headers), "clear_route_cache": True}
    expected = _routed(endpoints, request_headers={"response": common})
    assert replies.routed(endpoints, headers) == expected
    if body is not None:
        common["body_mutation"] = {"body": body}
    expected = _routed(endpoints, request_body={"response": common})
    assert replies.routed_by_body(endpoints, headers, body) == expected


@given(BODIES, st.booleans())
@settings(max_examples=40)
def test_the_pieces_of_a_body(body: bytes, last: bool) -> None:
    for kind, pieces in (("request_body", replies.request_pieces), ("response_body", replies.response_pieces)):
        written = list(pieces(body, last=last))
        rest = body
        for number, piece in enumerate(written):
            ends = last and number == len(written) - 1
            streamed = {"body": rest[: replies.PIECE], "end_of_stream": ends}
            message = ProcessingResponse(**{kind: {"response": {"body_mutation": {"streamed_response": streamed}}}})
            assert piece == message.SerializeToString()
            rest = rest[replies.PIECE :]
        assert not rest


@given(HEADERS, st.sampled_from([400, 429, 503]), st.text(max_size=200))
@settings(max_examples=30)
def test_an_error_in_place_of_an_answer(headers: list[tuple[bytes, bytes]], status: int, why: str) -> None:
    error = ApiError(status, why)
    expected = ProcessingResponse(
        immediate_response={
            "status": {"code": status},
            "headers": _set([(b"content-type", b"application/json"), *headers]),
            "body": orjson.dumps(error.body()),
            "details": replies.DETAILS + "why",
        }
    )
    assert replies.immediate(error, headers, "why") == expected.SerializeToString()


def test_answers_that_change_nothing() -> None:
    for kind in ("request_headers", "request_body", "request_trailers", "response_headers", "response_body"):
        message = ProcessingResponse()
        getattr(message, kind).SetInParent()
        assert getattr(replies, kind.upper()) == message.SerializeToString()
    added = [(b"x-served", b"1")]
    message = ProcessingResponse(response_headers={"response": {"header_mutation": _set(added)}})
    assert replies.response_headers(added) == message.SerializeToString()
