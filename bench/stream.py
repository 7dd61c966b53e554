"""Reading an answer that comes as server-sent events, with as little work as a measurement allows: of OpenAI's
completion and chat APIs, or of Anthropic's Messages API.

Only the events up to the first token and the last few are decoded: they say when the answer began, how long it is, how
much of the prompt was cached and whether it ended well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from runtime.sse import EMPTY_LINE, complete_events, event_data

_SEPARATOR = b"\n\n"
_DONE = b"[DONE]"
_MESSAGE_STOP = "message_stop"
LAST_EVENTS = 5
"""Events at the end that are decoded: finish reason, usage, error and [DONE] (or `message_stop`) are among them."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What the last events of a stream say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


def _decoded(data: bytes) -> dict[str, Any]:
    """The event's object; empty for what is not one."""
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return fields if type(fields) is dict else {}


def has_content(data: bytes) -> bool:
    """Whether this data holds a generated token; the chunk that only names the role and one without choices do not."""
    fields = _decoded(data)
    if fields.get("type") == "content_block_delta":
        return True
    for choice in fields.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            return "text" in choice
        if delta.get("content") or choice.get("finish_reason") is not None or "role" not in delta:
            return True
    return False


class FirstToken:
    """Finds the first event with content in a stream that arrives in pieces of any size."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> bool:
        """Take the next piece. Returns whether it completes the first event with content."""
        data = self._rest + piece
        size = complete_events(data)
        self._rest = data[size:]
        return any(has_content(event_data(event)) for event in EMPTY_LINE.split(data[:size]))


def ending(body: bytes) -> Ending:
    """What the last events of a whole stream say.

    An answer that stops before `[DONE]` (`message_stop` in the Messages API), that holds an error event (HTTP 200 was
    already sent when an engine died) or that the engine aborted is an error.
    """
    events = _last_events(body.replace(b"\r\n", b"\n"))
    usage: dict[str, Any] = {}
    last = events[-1].strip()
    whole = last == _DONE or _decoded(last).get("type") == _MESSAGE_STOP
    error = None if whole else "the stream ended before [DONE]"
    for data in events:
        fields = _decoded(data)
        usage = fields.get("usage") or usage
        if fields.get("error"):
            error = f"error event: {error_name(fields)}"
        for choice in fields.get("choices") or ():
            if choice.get("finish_reason") == "abort":
                error = "finish_reason abort"
    if "input_tokens" in usage:
        cached = usage.get("cache_read_input_tokens")
        prompt = usage["input_tokens"] + (cached or 0) + (usage.get("cache_creation_input_tokens") or 0)
        return Ending(prompt, cached, usage.get("output_tokens"), error)
    details = usage.get("prompt_tokens_details") or {}
    return Ending(usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens"), error)


def _last_events(body: bytes) -> list[bytes]:
    """Data of the last events, or one empty one; comments, which may stand anywhere, are no events."""
    found: list[bytes] = []
    end = len(body)
    while end > 0 and len(found) < LAST_EVENTS:
        start = body.rfind(_SEPARATOR, 0, end)
        if data := event_data(body[start + len(_SEPARATOR) if start >= 0 else 0 : end]):
            found.append(data)
        end = start
    return found[::-1] or [b""]


def error_name(fields: dict[str, Any]) -> str:
    """The type of an OpenAI error body, or what stands in its place; short, so that causes can be counted."""
    error = fields.get("error")
    name = error.get("type") or error.get("message") or "unnamed" if type(error) is dict else error
    # A server decides what this is: no control characters, which a terminal would obey.
    return "".join(each if each.isprintable() else "?" for each in str(name)[:80])


def status_error(status: int, body: bytes) -> tuple[str, str]:
    """What an answer with another status than 200 says: (a few words that can be counted, the error's own message)."""
    fields = _decoded(body)
    error = fields.get("error")
    if not error:
        return f"HTTP {status}", ""
    message = error.get("message") if type(error) is dict else error
    return f"HTTP {status} {error_name(fields)}", str(message or "")
