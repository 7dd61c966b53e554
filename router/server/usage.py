"""What an answer says of itself in its `usage`: the one source of every figure about cached tokens.

An answer that does not say how much of its prompt was cached counts on neither side of a hit rate: real engines leave
the details out at times, and a guess would move the rate either way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

MENTION = b'"usage"'
"""Bytes without which nothing can state a usage. Generated text cannot hold them: in JSON its quotes are escaped."""
_BEGINS = re.compile(rb'"usage"\s*:\s*\{')
_OBJECT = re.compile(rb'"usage"\s*:\s*(\{[^{}"]*(?:"[^"]*"[^{}"]*|\{[^{}]*\}[^{}"]*)*\})')
"""A usage object with, at most, objects of plain figures in it."""
_WINDOW = 4096
"""Bytes that a usage object takes at most, where it is looked for piece by piece."""


def states_usage(data: bytes) -> bool:
    """Whether it is worth reading: most events of a stream say `"usage":null`, or nothing."""
    return MENTION in data and _BEGINS.search(data) is not None


class Usage(NamedTuple):
    """Tokens, over all choices of an answer. None: not stated."""

    prompt: int
    completion: int | None = None
    cached: int | None = None


def read_usage(fields: Mapping[str, Any]) -> Usage | None:
    """The usage stated by an answer or by an event of one; None without one that can be made sense of.

    `usage` is an object with `prompt_tokens`, `completion_tokens` and `prompt_tokens_details.cached_tokens` (or, as the
    Responses API calls them, `input_tokens`, `output_tokens` and `input_tokens_details.cached_tokens`). The Messages
    API counts in `input_tokens` only what is neither in `cache_read_input_tokens` nor in `cache_creation_input_tokens`.
    """
    stated = fields.get("usage")
    if not isinstance(stated, dict):
        response = fields.get("response")
        stated = response.get("usage") if isinstance(response, dict) else None
        if not isinstance(stated, dict):
            return None
    ours, theirs, details = ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
    if ours not in stated:
        ours, theirs, details = ("input_tokens", "output_tokens", "input_tokens_details")
    prompt = _count(stated.get(ours))
    if prompt is None:
        return None
    more = stated.get(details)
    cached = _count(more.get("cached_tokens")) if isinstance(more, dict) else None
    if ours == "input_tokens":
        beside = [_count(stated.get(name)) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")]
        prompt += sum(count or 0 for count in beside)
        cached = cached if beside[0] is None else beside[0]
    if cached is not None and cached > prompt:
        cached = None
    return Usage(prompt, _count(stated.get(theirs)), cached)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


class UsageFinder:
    """Looks for the usage of a JSON answer too large to be read whole, in pieces of any size. Bounded memory."""

    __slots__ = ("_window", "usage")

    def __init__(self) -> None:
        self._window = b""
        self.usage: Usage | None = None
        """The last one stated so far."""

    def push(self, piece: bytes) -> None:
        """Takes the next piece."""
        window = self._window + piece
        for stated in _OBJECT.finditer(window):
            try:
                found = read_usage({"usage": orjson.loads(stated[1])})
            except orjson.JSONDecodeError:
                continue
            self.usage = found or self.usage
        self._window = window[-_WINDOW:]
