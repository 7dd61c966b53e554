"""Decides whether two answers to one request are equal, apart from what depends on the model, its cache and the clock.

Compared: the status, the headers that clients use, every field of the body and their order, the message of every error,
and the kinds and order of a stream's events. Ids, times, fingerprints, generated text and token ids, values of log
probabilities and cached tokens are replaced by their kind. If the model itself ended an answer (by its end of sequence,
or a stop string), its length depends on the weights, and neither length nor reason are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEADERS = frozenset(
    {
        "access-control-allow-headers",
        "access-control-allow-methods",
        "access-control-allow-origin",
        "access-control-max-age",
        "allow",
        "content-type",
        "location",
        "retry-after",
        "vary",
        "x-request-id",
    }
)

_ID = re.compile(r"^([a-zA-Z]+[-_])([0-9a-f]{16}|[0-9a-f]{32})$")
_HOST = re.compile("^https?://[^/]*")
_TEXTS = frozenset({"text", "content", "delta", "token", "decoded_token", "prompt_text", "thinking", "root"})
_TIMES = frozenset({"created", "created_at", "completed_at"})
_CACHE = frozenset(
    {
        "cached_tokens",
        "created_cache_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "cache_write_tokens",
    }
)
_LENGTHS = frozenset(
    {
        "completion_tokens", "finish_reason", "incomplete_details", "input_tokens", "output_tokens", "status",
        "stop_reason", "stop_sequence", "total_tokens",
    }
)  # fmt: skip
_ENDS = re.compile(
    r'"(?:finish_reason|stop_reason)":\s*"(?:stop|end_turn|stop_sequence)"|"service_tier":"\w+","status":"completed"'
)


@dataclass(frozen=True)
class Answer:
    """One answer as it came. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: str


def differences(request: Mapping[str, Any], real: Answer, ours: Answer) -> list[str]:
    """What is not equal, a line each; [] when the answers are equal."""
    found = []
    if real.status != ours.status:
        found.append(f"status: {real.status}, not {ours.status}")
    for name in sorted(HEADERS & (real.headers.keys() | ours.headers.keys())):
        if _header(real, name) != _header(ours, name):
            found.append(f"header {name}: {real.headers.get(name)!r}, not {ours.headers.get(name)!r}")
    ends = any(_ENDS.search(answer.body) for answer in (real, ours))
    wanted, got = (_read(answer, lengths=not ends) for answer in (real, ours))
    if isinstance(wanted, _Stream) and isinstance(got, _Stream):
        wanted, got = _aligned(wanted, got)
    found += _compare(wanted, got, at="")
    return found


def _header(answer: Answer, name: str) -> str | None:
    value = answer.headers.get(name)
    return value if value is None or name != "location" else _HOST.sub("", value)


def _read(answer: Answer, *, lengths: bool) -> Any:
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return _stream(answer.body, lengths)
    if kind.startswith("application/json") and answer.body:
        return _normal(json.loads(answer.body), "", lengths)
    return "a page" if kind.startswith(("text/html", "text/plain; version=")) else answer.body


class _Stream(dict[str, list[Any]]):
    """The events of a stream by choice; those of no choice under "all"."""


def _aligned(real: _Stream, ours: _Stream) -> list[Any]:
    """Both without the events of a choice that the other has merged into its last one."""
    shortest = {name: min(len(real[name]), len(ours[name])) for name in real.keys() & ours.keys() if name != "all"}
    return [{name: _shortened(events, shortest.get(name)) for name, events in one.items()} for one in (real, ours)]


def _shortened(events: list[Any], number: int | None) -> list[Any]:
    if number is None or number >= len(events):
        return events
    return events[-1:] if number == 1 else [events[0], *events[1 - number :]]


def _stream(body: str, lengths: bool) -> _Stream:
    """The events of each choice, in order. How many tokens share one depends on who was late, the client or the
    engine, and so does in which order choices take turns: equal events in a row count once."""
    events = _Stream()
    for event in body.split("\n\n"):
        lines = [line.partition(": ") for line in event.split("\n") if line]
        read = [(name, json.loads(value) if value.startswith("{") else value) for name, _, value in lines]
        data = next((value for _, value in read if isinstance(value, dict)), {})
        token = bool(data.get("choices"))
        key = str(data["choices"][0]["index"]) if token else "all"
        shape = [
            (name, _normal(value, "", lengths and not token) if isinstance(value, dict) else value)
            for name, value in read
        ]
        if token and (reason := data["choices"][0]["finish_reason"]) is not None and lengths:
            shape.append(("finish_reason", reason))
        if shape and (not events.get(key) or events[key][-1] != shape):
            events.setdefault(key, []).append(shape)
    return events


def _normal(value: Any, key: str, lengths: bool) -> Any:
    if key in _LENGTHS and not lengths:
        return "decided by the model"
    match value:
        case dict() if key in ("top_logprobs", "prompt_logprobs") and "logprob" not in value:
            return {"...": _normal(next(iter(value.values())), "logprob", lengths)} if value else {}
        case {"type": "raw_message_tokens"}:
            return "what the model read or wrote"
        case dict():
            return {name: _normal(entry, name, lengths) for name, entry in value.items()}
        case list() if key == "prompt_logprobs":
            return [_normal(entry, key, lengths) for entry in value]
        case list() if key in (
            "token_ids",
            "tokens",
            "token_logprobs",
            "text_offset",
            "bytes",
            "content",
            "top_logprobs",
        ):
            return _list(value, key, lengths)
        case list():
            return [_normal(entry, key, lengths) for entry in value]
        case str() if key in ("id", "item_id", "response_id", "previous_response_id") and (found := _ID.match(value)):
            return f"{found[1]}{len(found[2])}"
        case str() if key in _TEXTS or key == "system_fingerprint":
            return "str"
        case bool() | None:
            return value
        case int() | float() if key in _TIMES or key in ("logprob", "token_logprobs", "rank") or key in _CACHE:
            return "number"
        case int() if key == "sequence_number":
            return "number"
        case _:
            return value


def _list(value: list[Any], key: str, lengths: bool) -> Any:
    """A list of what the model made: each entry by its kind; how many, unless the model ended the answer."""
    if key == "bytes":
        return "bytes"
    if key == "content" and value and isinstance(value[0], dict) and "logprob" not in value[0]:
        return [_normal(entry, "", lengths) for entry in value]
    entries = [
        _normal(entry, key, lengths) if isinstance(entry, (dict, list)) or entry is None else type(entry).__name__
        for entry in value
    ]
    if key == "top_logprobs" and entries and not isinstance(value[0], dict | None):
        return entries
    return entries if lengths else entries[:1]


def _compare(real: Any, ours: Any, at: str) -> list[str]:
    if type(real) is not type(ours):
        return [f"{at}: {_short(real)}, not {_short(ours)}"]
    if isinstance(real, dict):
        if list(real) != list(ours):
            missing, more = real.keys() - ours.keys(), ours.keys() - real.keys()
            return [f"{at}: fields {list(real)}, not {list(ours)} (missing {missing or 'none'}, more {more or 'none'})"]
        return [line for name in real for line in _compare(real[name], ours[name], f"{at}.{name}")]
    if isinstance(real, list | tuple):
        if len(real) != len(ours):
            return [f"{at}: {len(real)} entries, not {len(ours)}"]
        return [
            line
            for index, (a, b) in enumerate(zip(real, ours, strict=True))
            for line in _compare(a, b, f"{at}[{index}]")
        ]
    return [] if real == ours else [f"{at}: {_short(real)}\n  not {_short(ours)}"]


def _short(value: Any) -> str:
    return repr(value)[:1500]
