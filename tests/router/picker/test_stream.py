"""One stream's protocol: which messages lead to which replies, in every mode of bodies, and what is refused.

Not covered: which worker is chosen (test_picker.py), and what a gateway makes of the replies (tests/envoy).
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import ApiError
from router.picker.protocol import BodyMode, ProcessingRequest
from router.picker.replies import PIECE
from router.picker.stream import Answer, BodyBudget, ProtocolError, Refusal, Stream, StreamState
from runtime.http.context import Headers
from tests.router.picker.messages import (
    destination,
    kinds,
    parsed,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    set_headers,
    streamed,
)

HERE = Answer("10.0.0.1:8000,10.0.0.2:8000")


@dataclass
class Notes:
    """Notes what it is told."""

    told: list[object] = field(default_factory=list)

    def answered(self, status: int, headers: Headers, served: str) -> Headers:
        self.told.append((status, served))
        return []

    def piece(self, data: bytes) -> None:
        self.told.append(data)

    def complete(self) -> None:
        self.told.append("complete")

    def lost(self) -> None:
        self.told.append("lost")


def stream_of(*, largest: int = 10_000_000, total: int = 20_000_000, full: bool = False) -> Stream:
    return Stream(BodyBudget(largest, total), full=full)


def test_a_get_is_decided_by_its_headers() -> None:
    stream = stream_of()
    assert stream.receive(request_headers("GET", "/v1/models?x=1", end=True)) == []
    assert stream.state is StreamState.DECIDING
    assert (stream.request.method, stream.request.path) == ("GET", "/v1/models")
    (reply,) = parsed(stream.routed(HERE, Notes()))
    assert reply.request_headers.response.clear_route_cache
    assert destination(reply) == HERE.endpoints == set_headers(reply)["x-gateway-destination-endpoint"]
    assert set_headers(reply)["x-request-id"]


def test_a_body_in_tiny_pieces_takes_no_more_than_the_budget_says() -> None:
    """A gateway passes a client's chunks on as they come, and the client chooses how small they are."""
    stream = stream_of()
    stream.receive(request_headers())
    tracemalloc.start()
    try:
        for _ in range(10_000):
            stream.receive(request_body(b"ab", end=False))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert stream.budget.used == 20_000
    assert held < 60_000
    stream.receive(request_body(b"c"))
    assert stream.request.body == b"ab" * 10_000 + b"c"


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b'{"prompt":"hi"}'], id="in one message"),
        pytest.param([b'{"pro', b'mpt":', b'"hi"}'], id="split"),
        pytest.param([b'{"prompt":"hi"}', b""], id="with an empty last message"),
    ],
)
def test_a_body_in_full_duplex_is_collected_and_sent_back(pieces: list[bytes]) -> None:
    stream = stream_of()
    assert stream.receive(request_headers(x_request_id="7")) == []
    for at, piece in enumerate(pieces):
        assert stream.receive(request_body(piece, end=at == len(pieces) - 1)) == []
    assert (stream.request.body, stream.request.whole) == (b'{"prompt":"hi"}', True)
    replies = stream.routed(HERE, Notes())
    assert kinds(replies) == ["request_headers", "request_body"]
    assert streamed(replies) == [(b'{"prompt":"hi"}', True)]
    assert "x-request-id" not in set_headers(parsed(replies)[0])
    assert (stream.budget.used, stream.request.body) == (0, b"")


@given(size=st.integers(0, 4 * PIECE), trailers=st.booleans())
@settings(max_examples=20, deadline=None)
def test_pieces_are_small_and_add_up_to_the_body(size: int, trailers: bool) -> None:
    stream, body = stream_of(), b"x" * size
    stream.receive(request_headers())
    stream.receive(request_body(body, end=not trailers))
    if trailers:
        stream.receive(request_trailers())
    replies = stream.routed(HERE, Notes())
    pieces = streamed(replies)
    assert b"".join(piece for piece, _ in pieces) == body
    assert all(len(piece) <= PIECE for piece, _ in pieces)
    assert [last for _, last in pieces].count(True) == (0 if trailers else 1)
    assert kinds(replies)[-1] == ("request_trailers" if trailers else "request_body")


def test_a_buffered_body_is_answered_where_it_comes() -> None:
    stream = stream_of()
    assert kinds(stream.receive(request_headers(mode=BodyMode.BUFFERED, content_length="2"))) == ["request_headers"]
    assert stream.receive(request_body(b"{}")) == []
    (reply,) = parsed(stream.routed(Answer("10.0.0.1:8000", body=b'{"request_id":"a"}'), Notes()))
    assert reply.request_body.response.body_mutation.body == b'{"request_id":"a"}'
    assert destination(reply) == set_headers(reply)["x-gateway-destination-endpoint"] == "10.0.0.1:8000"
    assert set_headers(reply)["content-length"] == "18"


@pytest.mark.parametrize("mode", [BodyMode.NONE, BodyMode.STREAMED])
def test_a_gateway_that_does_not_wait_for_the_body_is_answered_by_the_headers(mode: BodyMode) -> None:
    stream = stream_of()
    stream.receive(request_headers(mode=mode))
    assert (stream.state, stream.request.whole) == (StreamState.DECIDING, False)
    assert kinds(stream.routed(HERE, Notes())) == ["request_headers"]


def test_in_full_duplex_a_stream_ends_with_the_decision() -> None:
    """What the gateway sends of the answer after that would be lost with the stream."""
    stream, notes = stream_of(), Notes()
    stream.receive(request_headers("GET", "/v1/models", end=True))
    stream.routed(HERE, notes)
    assert (stream.state, notes.told) == (StreamState.ENDED, ["lost"])


@pytest.mark.parametrize("mode", [BodyMode.NONE, BodyMode.STREAMED, BodyMode.BUFFERED])
def test_in_other_modes_a_stream_ends_with_the_answers_headers(mode: BodyMode) -> None:
    stream, notes = stream_of(), Notes()
    stream.receive(request_headers("GET", "/v1/models", end=True, mode=mode))
    stream.routed(HERE, notes)
    assert kinds(stream.receive(response_headers(200, "10.0.0.2:8000"))) == ["response_headers"]
    assert stream.state is StreamState.ENDED
    assert notes.told == [(200, "10.0.0.2:8000"), "lost"]


def test_in_full_every_piece_of_the_answer_goes_back() -> None:
    stream, notes = stream_of(full=True), Notes()
    stream.receive(request_headers("GET", "/v1/models", end=True))
    stream.routed(HERE, notes)
    assert stream.state is StreamState.ROUTED
    # The mode of bodies is that of the headers' message, and a gateway that says nothing is taken to use full duplex.
    assert kinds(stream.receive(response_headers(200))) == ["response_headers"]
    assert streamed(stream.receive(response_body(b"one")), "response_body") == [(b"one", False)]
    assert streamed(stream.receive(response_body(b"", end=True)), "response_body") == [(b"", True)]
    assert stream.state is StreamState.ENDED
    assert notes.told == [(200, ""), b"one", "complete", "lost"]


@pytest.mark.parametrize(
    ("hint", "subset"),
    [
        pytest.param(["10.0.0.1:8000", " 10.0.0.2 "], {"10.0.0.1:8000", "10.0.0.2"}, id="a list"),
        pytest.param("10.0.0.1:8000, 10.0.0.2", {"10.0.0.1:8000", "10.0.0.2"}, id="a string"),
        pytest.param("", set(), id="an empty string"),
        pytest.param([], set(), id="an empty list"),
        pytest.param(7, set(), id="a number"),
        pytest.param({"a": "10.0.0.1"}, set(), id="an object"),
        pytest.param(None, set(), id="null"),
    ],
)
def test_a_subset_hint_that_names_nothing_allows_nothing(hint: object, subset: set[str]) -> None:
    stream = stream_of()
    stream.receive(request_headers(subset=hint))
    assert stream.request.subset == subset


def test_without_a_hint_every_endpoint_is_allowed() -> None:
    stream = stream_of()
    stream.receive(request_headers())
    assert stream.request.subset is None


def test_the_conformance_header_chooses_only_where_it_is_asked_for() -> None:
    chosen = request_headers(test_epp_endpoint_selection="10.0.0.2:8000")
    plain, strict = stream_of(), Stream(BodyBudget(10, 10), conformance=True)
    plain.receive(chosen)
    strict.receive(chosen)
    assert plain.request.subset is None
    assert strict.request.subset == {"10.0.0.2:8000"}
    strict.receive(request_body(b""))
    strict.routed(HERE, Notes())
    (reply,) = parsed(strict.receive(response_headers(200, "10.0.0.2:8000")))
    assert set_headers(reply) == {"x-conformance-test-served-endpoint": "10.0.0.2:8000"}


@pytest.mark.parametrize(
    ("path", "top"),
    [pytest.param("/v1/completions", "error", id="OpenAI"), pytest.param("/v1/messages", "type", id="Messages")],
)
def test_errors_have_the_shape_of_the_clients_api(path: str, top: str) -> None:
    stream = stream_of()
    stream.receive(request_headers(path=path, x_request_id="7"))
    (reply,) = parsed(stream.refused(Refusal(ApiError(503, "No."), "no_endpoint", [(b"retry-after", b"1")])))
    immediate = reply.immediate_response
    assert immediate.status.code == 503
    assert next(iter(json.loads(immediate.body))) == top
    assert set_headers(reply) == {"content-type": "application/json", "retry-after": "1", "x-request-id": "7"}
    assert stream.state is StreamState.ENDED


@pytest.mark.parametrize(
    ("largest", "total", "status"),
    [pytest.param(10, 100, 413, id="one too large"), pytest.param(100, 10, 503, id="all together too large")],
)
def test_bodies_are_bounded_and_given_back(largest: int, total: int, status: int) -> None:
    stream = stream_of(largest=largest, total=total)
    stream.receive(request_headers())
    stream.receive(request_body(b"x" * 8, end=False))
    with pytest.raises(Refusal) as refused:
        stream.receive(request_body(b"x" * 8, end=False))
    assert refused.value.error.status == status
    stream.refused(refused.value)
    assert stream.budget.used == 0


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([request_body(b"x")], id="a body first"),
        pytest.param([response_headers()], id="an answer first"),
        pytest.param([request_headers(), request_headers()], id="headers twice"),
        pytest.param([request_headers(), response_body(b"x")], id="an answer's body without its headers"),
        pytest.param([ProcessingRequest()], id="nothing"),
        pytest.param([request_trailers()], id="trailers first"),
    ],
)
def test_a_message_out_of_order_is_an_error_of_the_gateway(messages: list[object]) -> None:
    stream = stream_of()
    with pytest.raises(ProtocolError):  # noqa: PT012  # any of them
        for message in messages:
            stream.receive(message)
    stream.end()
    assert stream.budget.used == 0
