"""One ext_proc stream, which is one HTTP request of the gateway: messages in, replies out. Sans-IO."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from kvcache.errors import ApiError, MessagesError
from router.core.decision import RouteRequest
from router.picker import replies
from router.picker.endpoints import DESTINATION, METADATA, SERVED, namespace, subset_of
from router.picker.protocol import BodyMode
from router.server.auth import Admitted
from router.server.headers import find
from router.server.prompts import MESSAGES
from runtime.http.context import Headers

STREAMED, FULL_DUPLEX = BodyMode.STREAMED, BodyMode.FULL_DUPLEX_STREAMED
_BY_HEADERS = frozenset({BodyMode.NONE, STREAMED})
"""Modes of the request's body in which the gateway does not hold the headers back until the body is there."""

CONFORMANCE_CHOICE = b"test-epp-endpoint-selection"
CONFORMANCE_SERVED = b"x-conformance-test-served-endpoint"
_DESTINATION = DESTINATION.encode()


class StreamState(StrEnum):
    """How far a stream has got."""

    OPEN = "open"
    """Nothing has come yet."""
    COLLECTING = "collecting"
    """The request's headers have come, and its body is coming."""
    DECIDING = "deciding"
    """The request is whole: the picker has to say where it goes."""
    ROUTED = "routed"
    """The gateway knows where the request goes; its answer has not begun."""
    ANSWERING = "answering"
    """The answer has begun, and its body is followed."""
    ENDED = "ended"
    """Nothing more is said on the stream."""


class StreamEvent(StrEnum):
    """What happens on a stream."""

    HEADERS = "request headers"
    WHOLE = "request complete"
    ROUTED = "endpoint answered"
    ANSWER_HEADERS = "answer headers"
    ENDED = "stream ended"


STREAM_TRANSITIONS: Mapping[StreamState, Mapping[StreamEvent, StreamState]] = {
    StreamState.OPEN: {StreamEvent.HEADERS: StreamState.COLLECTING, StreamEvent.ENDED: StreamState.ENDED},
    StreamState.COLLECTING: {StreamEvent.WHOLE: StreamState.DECIDING, StreamEvent.ENDED: StreamState.ENDED},
    StreamState.DECIDING: {StreamEvent.ROUTED: StreamState.ROUTED, StreamEvent.ENDED: StreamState.ENDED},
    StreamState.ROUTED: {StreamEvent.ANSWER_HEADERS: StreamState.ANSWERING, StreamEvent.ENDED: StreamState.ENDED},
    StreamState.ANSWERING: {StreamEvent.ENDED: StreamState.ENDED},
    StreamState.ENDED: {StreamEvent.ENDED: StreamState.ENDED},
}
"""What is not listed cannot happen: the gateway broke the protocol."""


class ProtocolError(ValueError):
    """The gateway sent a message that cannot come now."""


class Refusal(Exception):
    """The request is answered with an error in place of a worker's answer. `why` is a label of metrics."""

    def __init__(self, error: ApiError, why: str, headers: Headers | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.why = why
        self.headers = headers or []


@dataclass(slots=True)
class BodyBudget:
    """Bytes that the bodies of all streams may take together, and the largest of one."""

    largest: int
    total: int
    used: int = 0

    def take(self, held: int, size: int) -> None:
        """A stream that holds `held` bytes gets `size` more. Raises `Refusal`."""
        if held + size > self.largest:
            raise Refusal(ApiError(413, f"The request's body is larger than {self.largest} bytes."), "too_large")
        if self.used + size > self.total:
            error = ApiError(503, "Too many large requests are being read. Try again later.")
            raise Refusal(error, "overloaded", [(b"retry-after", b"1")])
        self.used += size

    def give(self, size: int) -> None:
        self.used -= size


@dataclass(slots=True)
class PickRequest:
    """A whole request, as far as a decision needs it."""

    method: str = ""
    path: str = ""
    """Without its query."""
    headers: Headers = field(default_factory=list)
    request_id: bytes = b""
    body: bytes = b""
    whole: bool = True
    """The body was not cut off by the gateway, and is seen before the decision."""
    subset: frozenset[str] | None = None
    admitted: Admitted | None = None
    """The API key that it was admitted with, if keys are asked for."""
    route: RouteRequest | None = None
    """What it is known to ask, while it waits for its turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Where a request goes."""

    endpoints: str
    headers: Headers = field(default_factory=list)
    """Set in the request, beside the destination."""
    body: bytes | None = None
    """The request's new body; None: it stays as it is."""
    removed: Collection[bytes] = ()
    """Headers that the worker does not get."""


class Follower(Protocol):
    """What is told how a routed request is answered."""

    def answered(self, status: int, headers: Headers, served: str) -> Headers:
        """The answer's headers have come, from `served` (empty: unknown). Returns those to add."""

    def piece(self, data: bytes) -> None: ...
    def complete(self) -> None: ...
    def lost(self) -> None: ...


class Stream:
    """The protocol's state. `receive` takes a message; once the state is `DECIDING`, `routed` or `refused` says what
    was decided. Each returns the replies to send, and when the state is `ENDED` the stream is closed after them."""

    __slots__ = (
        "_body", "_conformance", "_full", "_held", "_mode", "_named", "_response_mode", "_rest", "_trailers",
        "budget", "follower", "request", "state",
    )  # fmt: skip

    def __init__(self, budget: BodyBudget, *, full: bool = False, conformance: bool = False) -> None:
        """`full`: follow the answer's body; `conformance`: say in the answer who served it, and obey the request header
        that chooses an endpoint, as the conformance tests of gateways ask."""
        self.state = StreamState.OPEN
        self.budget = budget
        self.request = PickRequest()
        self.follower: Follower | None = None
        self._full = full or conformance
        self._conformance = conformance
        self._body = b""
        """The first piece, which most bodies are whole."""
        self._rest = bytearray()
        """What follows it, copied together: clients choose how small the pieces are."""
        self._held = 0
        self._mode: int = FULL_DUPLEX
        self._response_mode: int = FULL_DUPLEX
        self._trailers = False
        self._named = b""

    def advance(self, event: StreamEvent) -> None:
        """Every change of state. Raises `ProtocolError`."""
        state = STREAM_TRANSITIONS[self.state].get(event)
        if state is None:
            raise ProtocolError(f"{event.value} cannot come on a stream that is {self.state.value}")
        self.state = state

    def receive(self, message: Any) -> list[bytes]:
        """The next message. Raises `ProtocolError`, or `Refusal` if the request is too large: call `refused` then."""
        match message.WhichOneof("kind"):
            case "request_headers":
                return self._request_headers(message)
            case "request_body":
                return self._request_body(message.request_body)
            case "request_trailers":
                return self._request_trailers()
            case "response_headers":
                return self._response_headers(message)
            case "response_body":
                return self._response_body(message.response_body)
            case "response_trailers":
                return self._response_trailers()
            case _:
                raise ProtocolError("a message without a request came")

    # --- the request ------------------------------------------------------------------------------------

    def _request_headers(self, message: Any) -> list[bytes]:
        self.advance(StreamEvent.HEADERS)
        if message.HasField("protocol_config"):
            self._mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        headers = _headers(message.request_headers)
        request = self.request
        request.headers = headers
        for name, value in headers:
            if name == b":method":
                request.method = value.decode("latin-1")
            elif name == b":path":
                request.path = value.partition(b"?")[0].decode("latin-1")
            elif name == b"x-request-id":
                request.request_id = value
            elif name == CONFORMANCE_CHOICE and self._conformance:
                self._named = value
        request.subset = subset_of(message.metadata_context)
        if self._named:
            chosen = frozenset(self._named.decode("latin-1").replace(" ", "").split(","))
            request.subset = chosen if request.subset is None else chosen & request.subset
        if message.request_headers.end_of_stream:
            self._mode = BodyMode.NONE
        elif self._mode in _BY_HEADERS:
            request.whole = False
        if self._mode in _BY_HEADERS:
            self.advance(StreamEvent.WHOLE)
            return []
        return [] if self._mode == FULL_DUPLEX else [replies.REQUEST_HEADERS]

    def _request_body(self, body: Any) -> list[bytes]:
        if self.state is not StreamState.COLLECTING:
            if self.state in (StreamState.ROUTED, StreamState.ANSWERING) and self._mode == STREAMED:
                return [replies.REQUEST_BODY]
            raise ProtocolError(f"a request's body cannot come on a stream that is {self.state.value}")
        if data := body.body:
            self.budget.take(self._held, len(data))
            self._held += len(data)
            if self._body:
                self._rest += data
            else:
                self._body = data
        if body.end_of_stream or self._mode != FULL_DUPLEX:
            self.request.whole = body.end_of_stream
            self._whole()
        return []

    def _request_trailers(self) -> list[bytes]:
        if self.state is StreamState.COLLECTING:
            self._trailers = True
            self._whole()
            return []
        if self.state in (StreamState.ROUTED, StreamState.ANSWERING):
            return [replies.REQUEST_TRAILERS]
        raise ProtocolError(f"a request's trailers cannot come on a stream that is {self.state.value}")

    def _whole(self) -> None:
        self.advance(StreamEvent.WHOLE)
        self.request.body = self._body + self._rest if self._rest else self._body
        self._body, self._rest = b"", bytearray()

    def routed(self, answer: Answer, follower: Follower) -> list[bytes]:
        """The picker says where the request goes."""
        self.advance(StreamEvent.ROUTED)
        self.follower = follower
        request, mode = self.request, self._mode
        headers: Headers = [(_DESTINATION, answer.endpoints.encode()), *answer.headers]
        if not request.request_id:
            headers.append((b"x-request-id", uuid.uuid4().hex.encode()))
        body = request.body if answer.body is None else answer.body
        # In full duplex Envoy drops the length, as the body may change, and the worker gets chunks: unless this states
        # the length, and the gateway allows it (`allow_content_length_header`).
        if (mode == FULL_DUPLEX and not self._trailers) or answer.body is not None:
            headers.append((b"content-length", b"%d" % len(body)))
        if mode in _BY_HEADERS:
            sent = [replies.routed(answer.endpoints, headers, answer.removed)]
        elif mode == FULL_DUPLEX:
            sent = [replies.routed(answer.endpoints, headers, answer.removed)]
            if body or not self._trailers:
                sent.extend(replies.request_pieces(body, last=not self._trailers))
            if self._trailers:
                sent.append(replies.REQUEST_TRAILERS)
        else:
            sent = [replies.routed_by_body(answer.endpoints, headers, answer.body, answer.removed)]
        self._release_body()
        if not self._follows:
            self.end()
        return sent

    @property
    def _follows(self) -> bool:
        """Whether the answer is looked at. In full duplex the gateway sends its body without waiting for anything, and
        what it has sent would be lost if the stream were closed then: it is followed to its end or not at all."""
        return self._full or self._response_mode != FULL_DUPLEX

    def refused(self, refusal: Refusal) -> list[bytes]:
        """The picker, or a limit, refuses the request."""
        self.end()
        error = refusal.error
        if self.request.path == MESSAGES:
            error = MessagesError(error)
        headers = refusal.headers
        if self.request.request_id:
            headers = [*headers, (b"x-request-id", self.request.request_id)]
        return [replies.immediate(error, headers, refusal.why)]

    # --- the answer -------------------------------------------------------------------------------------

    def _response_headers(self, message: Any) -> list[bytes]:
        if self.state is StreamState.COLLECTING:  # the gateway refuses the request itself, for its size, say
            self.end()
            return [replies.RESPONSE_HEADERS]
        self.advance(StreamEvent.ANSWER_HEADERS)
        headers = _headers(message.response_headers)
        served = _served(message)
        status = find(headers, b":status")
        follower, added = self.follower, []
        if follower is not None:
            added = follower.answered(int(status) if status.isdigit() else 0, headers, served)
            if message.response_headers.end_of_stream:
                follower.complete()
        if not self._full or self._response_mode == BodyMode.NONE or message.response_headers.end_of_stream:
            self.end()
        if self._conformance and served:
            added = [*added, (CONFORMANCE_SERVED, served.encode())]
        return [replies.response_headers(added) if added else replies.RESPONSE_HEADERS]

    def _response_body(self, body: Any) -> list[bytes]:
        if self.state is not StreamState.ANSWERING:
            raise ProtocolError(f"an answer's body cannot come on a stream that is {self.state.value}")
        data, last = body.body, body.end_of_stream
        if self.follower is not None:
            if data:
                self.follower.piece(data)
            if last:
                self.follower.complete()
        if last:
            self.end()
        if self._response_mode != FULL_DUPLEX:
            return [replies.RESPONSE_BODY]
        return list(replies.response_pieces(data, last=last))

    def _response_trailers(self) -> list[bytes]:
        if self.state is not StreamState.ANSWERING:
            raise ProtocolError(f"an answer's trailers cannot come on a stream that is {self.state.value}")
        if self.follower is not None:
            self.follower.complete()
        self.end()
        return [replies.RESPONSE_TRAILERS]

    # --- the end ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """The stream is over, however that came. Idempotent."""
        self.advance(StreamEvent.ENDED)
        self._release_body()
        if self.follower is not None:
            self.follower.lost()
            self.follower = None

    def _release_body(self) -> None:
        self.budget.give(self._held)
        self._held = 0
        self._body, self._rest = b"", bytearray()
        self.request.body = b""


def _headers(message: Any) -> Headers:
    return [(each.key.encode(), each.raw_value or each.value.encode()) for each in message.headers.headers]


def _served(message: Any) -> str:
    """The endpoint that answered; empty where the gateway does not say so."""
    fields = namespace(message.metadata_context, METADATA)
    served: str = fields[SERVED].string_value if fields is not None and SERVED in fields else ""
    return served
