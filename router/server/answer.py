"""What the beginning of a worker's answer says, and where its events end. Pure functions over bytes.

A worker that fails says so in its answer as often as in its status: vLLM's engine dying in a stream is status 200 with
an error event, and at shutdown it ends its requests with finish reason "abort". As long as nothing has gone to the
client such an answer can be dropped and the request sent to another worker.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import orjson

MAX_HELD = 65_536
"""Bytes of a stream's beginning that are held back at most while it has not shown whether it is an answer."""

_CACHED = b'"cached_tokens":'


class Verdict(Enum):
    """What to do with a stream of which only the beginning has arrived."""

    WAIT = auto()
    """It has not answered yet: nothing, or only the role of a chat answer."""
    PASS = auto()
    """It answers (or is refused, which is an answer too)."""
    ERROR = auto()
    """Its first event is a server's error."""
    ABORT = auto()
    """It was aborted before any text."""


def judge_stream(held: bytes) -> Verdict:
    """Verdict on a stream of server-sent events that begins with `held`."""
    end = complete_events(held)
    for line in held[:end].splitlines():
        if not line.startswith(b"data:"):
            continue
        verdict = _judge_event(line[5:].strip())
        if verdict is not Verdict.WAIT:
            return verdict
    return Verdict.PASS if len(held) > MAX_HELD else Verdict.WAIT


def _judge_event(data: bytes) -> Verdict:
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        return Verdict.PASS  # [DONE], or a protocol we do not know
    if not isinstance(fields, dict):
        return Verdict.PASS
    error = fields.get("error")
    if isinstance(error, dict):
        code = error.get("code")
        return Verdict.ERROR if isinstance(code, int) and code >= 500 else Verdict.PASS
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices:
        return Verdict.PASS
    verdicts = {_judge_choice(choice) for choice in choices}
    for verdict in (Verdict.PASS, Verdict.ABORT):
        if verdict in verdicts:
            return verdict
    return Verdict.WAIT


def _judge_choice(choice: Any) -> Verdict:
    if not isinstance(choice, dict):
        return Verdict.PASS
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else _delta_text(delta)
    if text or choice.get("token_ids"):
        return Verdict.PASS
    finish = choice.get("finish_reason")
    if finish == "abort":
        return Verdict.ABORT
    # A completion's first event is its first token, even if that holds no whole character yet; a chat's is the role.
    return Verdict.PASS if finish is not None or delta is None else Verdict.WAIT


def _delta_text(delta: Any) -> Any:
    if not isinstance(delta, dict):
        return delta
    return any(value for name, value in delta.items() if name != "role")


def was_aborted(body: bytes) -> bool:
    """Whether a complete answer in JSON was cut short by its engine (finish reason "abort")."""
    if b'"abort"' not in body:
        return False
    try:
        choices = orjson.loads(body).get("choices")
    except (orjson.JSONDecodeError, AttributeError):
        return False
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices
    )


def complete_events(data: bytes) -> int:
    """How many bytes of `data` are whole events (each ends with an empty line)."""
    if data.endswith((b"\n\n", b"\r\n\r\n")):
        return len(data)
    plain, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def cached_tokens(data: bytes) -> int | None:
    """The last `cached_tokens` that `data`, a part of an answer, reports. Runs on each piece, hence looks for bytes."""
    at = data.rfind(_CACHED)
    if at < 0:
        return None
    digits = data[at + len(_CACHED) : at + len(_CACHED) + 20].lstrip()
    count = 0
    while count < len(digits) and 48 <= digits[count] <= 57:
        count += 1
    return int(digits[:count]) if count else None
