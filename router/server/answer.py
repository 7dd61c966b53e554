"""What a worker's answer says: whether it is one, when its first token comes, and its `usage`. Sans-IO, over bytes.

A worker that fails says so in its answer as often as in its status: when vLLM's engine dies during a stream the status
is 200 and an event holds an error, and at shutdown vLLM ends its requests with finish reason "abort". As long as
nothing has been sent to the client such an answer can be dropped and the request sent to another worker.

`usage` is the one source of every figure about cached tokens. An answer that does not say how much of its prompt was
cached counts on neither side of a hit rate: real engines leave the details out at times, and a guess would bias it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

import orjson

from router.core.latency_samples import Usage
from runtime.sse import EMPTY_LINE, complete_events, event_data, first_event, is_comment

MAX_HELD = 262_144
"""Bytes of a stream that are held back at most: the events before the first with content, and an event that is not
complete. A longer event is passed on in parts and is not read."""

_ERROR = b'"error"'
_QUIET_TYPES = frozenset(
    {
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_part.added",
        "message_start",
        "content_block_start",
        "ping",
    }
)
"""Events of the Responses and Messages APIs that come before the first with content."""
_SERVER_ERRORS = frozenset({"api_error", "internal_error", "overloaded_error", "InternalServerError"})

_USAGE = b'"usage"'
"""Bytes without which nothing can state a usage. Generated text cannot hold them: in JSON its quotes are escaped."""
_USAGE_BEGINS = re.compile(rb'"usage"\s*:\s*\{')
_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*(\{[^{}"]*(?:"[^"]*"[^{}"]*|\{[^{}]*\}[^{}"]*)*\})')
"""A usage object that holds, at most, objects of plain numbers."""
_USAGE_WINDOW = 4096
"""Bytes that a usage object takes at most, where `UsageFinder` looks for one."""


class StreamState(Enum):
    """How far a stream has got."""

    SILENT = auto()
    """No event with content has come: only comments, a chat's role, or nothing."""
    ANSWERING = auto()
    """The first token has come."""
    REFUSED = auto()
    """There will be no token: the request was refused, which is an answer too, or there is nothing to generate."""
    FAILED = auto()
    """The server says that it failed."""
    ABORTED = auto()
    """The engine aborted the request before its first token."""

    @property
    def is_failure(self) -> bool:
        """Whether it is the worker's fault that there is no whole answer."""
        return self in (StreamState.FAILED, StreamState.ABORTED)


class EventKind(Enum):
    """What one event of a stream says about the stream."""

    QUIET = auto()
    """Nothing: it comes before the first token."""
    CONTENT = auto()
    REFUSAL = auto()
    """An error that the client caused, or the end."""
    FAILURE = auto()
    """An error of the server."""
    ABORT = auto()


_TRANSITIONS: Mapping[tuple[StreamState, EventKind], StreamState] = {
    (StreamState.SILENT, EventKind.CONTENT): StreamState.ANSWERING,
    (StreamState.SILENT, EventKind.REFUSAL): StreamState.REFUSED,
    (StreamState.SILENT, EventKind.ABORT): StreamState.ABORTED,
    **{(state, EventKind.FAILURE): StreamState.FAILED for state in StreamState},
}


def transition(state: StreamState, kind: EventKind) -> StreamState:
    """The state of a stream after an event of this kind. What the table does not list changes nothing."""
    return _TRANSITIONS.get((state, kind), state)


class AnswerStream:
    """An answer in server-sent events that arrives in pieces of any size.

    Only whole events are passed on, so that a stream that breaks off ends between two events. While the stream is
    `SILENT`, events are held back until the first with content. A comment is passed on at once, together with what was
    held back before it.
    """

    __slots__ = ("_max_held", "_rest", "state", "usage")

    def __init__(self, max_held: int = MAX_HELD) -> None:
        self._max_held = max_held
        self.state = StreamState.SILENT
        self.usage: Usage | None = None
        """What the last event that states a usage says."""
        self._rest = b""
        """What is held back."""

    def push(self, piece: bytes) -> bytes:
        """Take the next piece. Returns the bytes that may be passed on now."""
        data = self._rest + piece if self._rest else piece
        passed = self._pass_silent(data) if self.state is StreamState.SILENT else None
        if passed is None:
            passed = complete_events(data) or (len(data) if len(data) > self._max_held else 0)
            self._read(data[:passed])
        self._rest = data[passed:]
        return data[:passed]

    def finish(self) -> bytes:
        """The stream has ended. Returns what was held back."""
        rest, self._rest = self._rest, b""
        return rest

    def _pass_silent(self, data: bytes) -> int | None:
        """How many bytes may be passed on of a stream that was silent before `data`; None if it is silent no more."""
        looked = passed = 0
        while size := first_event(data, looked):
            event = data[looked : looked + size]
            looked += size
            if is_comment(event):
                passed = looked
                continue
            self.state = transition(self.state, _classify(event))
            if self.state is not StreamState.SILENT:
                return None
        # A comment ends with its line, even if no empty line follows.
        while data[looked : looked + 1] in (b":", b"\n", b"\r") and (line := data.find(b"\n", looked) + 1):
            looked = passed = line
        if len(data) - passed > self._max_held:
            # So many bytes must be an answer, in a protocol that is not known here.
            self.state = transition(self.state, EventKind.CONTENT)
            return None
        return passed

    def _read(self, events: bytes) -> None:
        """Note the usage and the errors that whole events state."""
        if _ERROR not in events and not states_usage(events):
            return
        for event in EMPTY_LINE.split(events):
            if (_ERROR in event or states_usage(event)) and (fields := event_fields(event_data(event))) is not None:
                self.usage = read_usage(fields) or self.usage
                if error_kind(fields) is EventKind.FAILURE:
                    self.state = transition(self.state, EventKind.FAILURE)


def _classify(event: bytes) -> EventKind:
    """What an event says about a stream that was silent before it."""
    data = event_data(event).strip()
    if not data:
        return EventKind.QUIET
    fields = event_fields(data)
    if fields is None:  # the end, or a protocol that is not known here
        return EventKind.REFUSAL if data == b"[DONE]" else EventKind.CONTENT
    error = error_kind(fields)
    if error is not None:
        return error
    choices = fields.get("choices")
    if not isinstance(choices, list):
        if fields.get("type") in _QUIET_TYPES:
            return EventKind.QUIET
        return EventKind.ABORT if _is_aborted(fields) else EventKind.CONTENT
    kinds = {_classify_choice(choice) for choice in choices}
    for kind in (EventKind.CONTENT, EventKind.ABORT):
        if kind in kinds:
            return kind
    return EventKind.QUIET


def error_kind(fields: dict[str, Any]) -> EventKind | None:
    """`FAILURE` or `REFUSAL` for an error event; None for any other event."""
    error = fields.get("error")
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    failed = code >= 500 if type(code) is int else error.get("type") in _SERVER_ERRORS
    return EventKind.FAILURE if failed else EventKind.REFUSAL


def _classify_choice(choice: Any) -> EventKind:
    if not isinstance(choice, dict):
        return EventKind.CONTENT
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else _delta_text(delta)
    if text or choice.get("token_ids"):
        return EventKind.CONTENT
    finish = choice.get("finish_reason")
    if finish == "abort":
        return EventKind.ABORT
    # A completion's first event is its first token, even if that is no whole character yet; a chat's is the role.
    return EventKind.CONTENT if finish is not None or delta is None else EventKind.QUIET


def _is_aborted(fields: Mapping[str, Any]) -> bool:
    """Whether an answer of the Messages or Responses API, or the event that ends one, is that of a request which the
    engine aborted: vLLM then gives no reason for the end, or ends it without a token."""
    match fields:
        case {"type": "message", **rest}:
            return rest.get("stop_reason") is None
        case {"type": "message_delta", "delta": {"stop_reason": None}} | {
            "type": "message_delta",
            "usage": {"output_tokens": 0},
        }:
            return True
        case {"object": "response", "usage": {"output_tokens": 0}}:
            return True
        case {"type": "response.completed", "response": {"usage": {"output_tokens": 0}}}:
            return True
        case _:
            return False


def _delta_text(delta: Any) -> Any:
    if not isinstance(delta, dict):
        return delta
    return any(value for name, value in delta.items() if name != "role")


def event_fields(data: bytes) -> dict[str, Any] | None:
    """The JSON object in an event's data, or in an answer; None if it is none."""
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


class WholeAnswer(NamedTuple):
    """What a complete answer in JSON says."""

    aborted: bool = False
    """The engine cut it short (finish reason "abort")."""
    usage: Usage | None = None
    choices: int = 1


def read_answer(body: bytes) -> WholeAnswer:
    """What `body`, a complete answer that is not a stream, says. The default if it is no JSON object."""
    if b'"abort"' not in body and _USAGE not in body:
        return WholeAnswer()
    fields = event_fields(body)
    if fields is None:
        return WholeAnswer()
    choices = fields.get("choices")
    if not isinstance(choices, list):
        return WholeAnswer(_is_aborted(fields), read_usage(fields))
    aborted = any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices)
    return WholeAnswer(aborted, read_usage(fields), len(choices))


def states_usage(data: bytes) -> bool:
    """Whether `data` states a usage, so that parsing it is worth the time: most events of a stream say `"usage":null`,
    or nothing."""
    return _USAGE in data and _USAGE_BEGINS.search(data) is not None


def read_usage(fields: Mapping[str, Any]) -> Usage | None:
    """The usage that an answer, or an event of one, states. None if it states none, or none that makes sense.

    `usage` is an object with `prompt_tokens`, `completion_tokens` and `prompt_tokens_details.cached_tokens`. The
    Responses API calls them `input_tokens`, `output_tokens` and `input_tokens_details.cached_tokens`. The Messages API
    leaves out of `input_tokens` what `cache_read_input_tokens` and `cache_creation_input_tokens` count.
    """
    stated = fields.get("usage")
    if not isinstance(stated, dict):
        response = fields.get("response")
        stated = response.get("usage") if isinstance(response, dict) else None
        if not isinstance(stated, dict):
            return None
    prompt_name, completion_name, details_name = ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
    if prompt_name not in stated:
        prompt_name, completion_name, details_name = ("input_tokens", "output_tokens", "input_tokens_details")
    prompt = _count(stated.get(prompt_name))
    if prompt is None:
        return None
    details = stated.get(details_name)
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    if prompt_name == "input_tokens":
        beside = [_count(stated.get(name)) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")]
        prompt += sum(count or 0 for count in beside)
        cached = cached if beside[0] is None else beside[0]
    if cached is not None and cached > prompt:
        cached = None
    return Usage(prompt, _count(stated.get(completion_name)), cached)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


class UsageFinder:
    """Finds the usage in a JSON answer that is too large to be parsed, in pieces of any size, in bounded memory."""

    __slots__ = ("_window", "usage")

    def __init__(self) -> None:
        self._window = b""
        self.usage: Usage | None = None
        """The last usage found so far."""

    def push(self, piece: bytes) -> None:
        """Take the next piece."""
        window = self._window + piece
        for stated in _USAGE_OBJECT.finditer(window):
            try:
                found = read_usage({"usage": orjson.loads(stated[1])})
            except orjson.JSONDecodeError:
                continue
            self.usage = found or self.usage
        self._window = window[-_USAGE_WINDOW:]
