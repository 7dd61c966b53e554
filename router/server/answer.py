"""What a worker's answer says: whether it is one, when it begins, and what it cost. Sans-IO, over bytes.

A worker that fails says so in its answer as often as in its status: vLLM's engine dying in a stream is status 200 with
an error event, and at shutdown it ends its requests with finish reason "abort". As long as nothing has gone to the
client such an answer can be dropped and the request sent to another worker.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, NamedTuple

import orjson

from router.server.usage import MENTION, Usage, read_usage, states_usage
from runtime.sse import EMPTY_LINE, complete_events, event_data, first_event, is_comment

MAX_HELD = 262_144
"""Bytes of a stream that are held back at most: events before the first with content, and one that is not complete. An
event that is longer goes on in parts and is not read."""

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


class Stage(Enum):
    """How far a stream has got."""

    SILENT = auto()
    """No event with content yet: comments, a chat's role, or nothing."""
    ANSWERING = auto()
    """Its first token has come."""
    REFUSED = auto()
    """It has no token to come: the request was refused, which is an answer too, or there is nothing to say."""
    FAILED = auto()
    """The server says that it failed."""
    ABORTED = auto()
    """The engine aborted the request before its first token."""

    @property
    def broken(self) -> bool:
        """Whether it is the worker's fault that there is no whole answer."""
        return self in (Stage.FAILED, Stage.ABORTED)


class AnswerStream:
    """An answer in server-sent events that arrives in pieces of any size.

    Whole events go on, so that a stream that breaks off ends between two of them. While it is `SILENT`, events wait for
    the first with content; comments go on at once, with whatever waits before them.
    """

    __slots__ = ("_rest", "stage", "usage")

    def __init__(self) -> None:
        self.stage = Stage.SILENT
        self.usage: Usage | None = None
        """What the last event that states a usage says, of its cached tokens above all."""
        self._rest = b""
        """What has not gone on."""

    def push(self, piece: bytes) -> bytes:
        """Takes the next piece; the bytes that may go on now."""
        data = self._rest + piece if self._rest else piece
        passed = self._silent(data) if self.stage is Stage.SILENT else None
        if passed is None:
            passed = complete_events(data) or (len(data) if len(data) > MAX_HELD else 0)
            self._read(data[:passed])
        self._rest = data[passed:]
        return data[:passed]

    def finish(self) -> bytes:
        """The stream is over: what is left of it."""
        rest, self._rest = self._rest, b""
        return rest

    def _silent(self, data: bytes) -> int | None:
        """How much may go on of a stream that was silent before `data`; None when it no longer is."""
        looked = passed = 0
        while size := first_event(data, looked):
            event = data[looked : looked + size]
            looked += size
            if is_comment(event):
                passed = looked
                continue
            self.stage = _judge(event)
            if self.stage is not Stage.SILENT:
                return None
        # A comment is over with its line, even if no empty line follows.
        while data[looked : looked + 1] in (b":", b"\n", b"\r") and (line := data.find(b"\n", looked) + 1):
            looked = passed = line
        if len(data) - passed > MAX_HELD:
            self.stage = Stage.ANSWERING  # so much of it must be an answer, if one that is not known here
            return None
        return passed

    def _read(self, events: bytes) -> None:
        """Notes what whole events state."""
        if _ERROR not in events and not states_usage(events):
            return
        for event in EMPTY_LINE.split(events):
            if (_ERROR in event or states_usage(event)) and (fields := _object(event_data(event))) is not None:
                self.usage = read_usage(fields) or self.usage
                if _error_stage(fields) is Stage.FAILED:
                    self.stage = Stage.FAILED


def _judge(event: bytes) -> Stage:
    """Where one event takes a stream that was silent before."""
    data = event_data(event)
    if not data:
        return Stage.SILENT
    fields = _object(data)
    if fields is None:  # the end, or a protocol that is not known here
        return Stage.REFUSED if data.strip() == b"[DONE]" else Stage.ANSWERING
    error = _error_stage(fields)
    if error is not None:
        return error
    choices = fields.get("choices")
    if not isinstance(choices, list):
        return Stage.SILENT if fields.get("type") in _QUIET_TYPES else Stage.ANSWERING
    stages = {_judge_choice(choice) for choice in choices}
    for stage in (Stage.ANSWERING, Stage.ABORTED):
        if stage in stages:
            return stage
    return Stage.SILENT


def _error_stage(fields: dict[str, Any]) -> Stage | None:
    """What an error event says of the stream; None for an event that is none."""
    error = fields.get("error")
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    failed = code >= 500 if type(code) is int else error.get("type") in _SERVER_ERRORS
    return Stage.FAILED if failed else Stage.REFUSED


def _judge_choice(choice: Any) -> Stage:
    if not isinstance(choice, dict):
        return Stage.ANSWERING
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else _delta_text(delta)
    if text or choice.get("token_ids"):
        return Stage.ANSWERING
    finish = choice.get("finish_reason")
    if finish == "abort":
        return Stage.ABORTED
    # A completion's first event is its first token, even if that holds no whole character yet; a chat's is the role.
    return Stage.ANSWERING if finish is not None or delta is None else Stage.SILENT


def _delta_text(delta: Any) -> Any:
    if not isinstance(delta, dict):
        return delta
    return any(value for name, value in delta.items() if name != "role")


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


class WholeAnswer(NamedTuple):
    """What a complete answer in JSON says."""

    aborted: bool = False
    """It was cut short by its engine (finish reason "abort")."""
    usage: Usage | None = None
    choices: int = 1


def read_answer(body: bytes) -> WholeAnswer:
    """What `body`, a complete answer that is no stream, says; nothing if it is no JSON object."""
    if b'"abort"' not in body and MENTION not in body:
        return WholeAnswer()
    fields = _object(body)
    if fields is None:
        return WholeAnswer()
    choices = fields.get("choices")
    if not isinstance(choices, list):
        return WholeAnswer(usage=read_usage(fields))
    aborted = any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices)
    return WholeAnswer(aborted, read_usage(fields), len(choices))
