"""Which streams may go on at another worker, and what the request for the rest of one has to repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from router.server.prompts import CHAT

COMPLETION_TOKENS = 16
"""Tokens of a completion that states no limit."""

_REPEATED = frozenset(
    {
        "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids",
        "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "stream_options",
        "priority", "cache_salt", "session_id", "user", "stream_interval", "stop",
    }
)  # fmt: skip
"""What the request for the rest has to say again. The distribution of a token depends on these and on the tokens before
it, whether they were prompt or answer."""
_OVER = frozenset(
    {
        "messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "min_tokens", "return_token_ids",
        "chat_template", "chat_template_kwargs", "documents", "add_generation_prompt", "continue_final_message",
        "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "reasoning_effort", "parallel_tool_calls",
        "request_id", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "length_penalty",
        "tool_choice", "tools",
    }
)  # fmt: skip
"""What has had its effect when the first token comes, or has none on the tokens of a single choice."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_logprobs": (0,),
    "include_reasoning": (True,),
    "response_format": ({"type": "text"},),
}
"""Values that say the same as none. For fields that are not listed these are null, false and what is empty."""


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What is kept of the request for a stream that may have to go on elsewhere."""

    chat: bool
    sampling: Mapping[str, Any]
    """Fields that the request for the rest repeats."""
    max_tokens: int | None
    """None: as many as fit."""
    min_tokens: int
    shows_ids: bool
    """The client has asked for token ids."""
    counts: bool
    """The client has asked for the usage."""
    skips_special: bool
    stops: tuple[str, ...]
    """Stop strings."""
    offered_tools: Mapping[str, Any] | None
    """The whole body of a chat that offers tools: the engine has to look for calls of them in the rest too."""


def stream_request(path: str, body: bytes) -> StreamRequest | None:
    """The request, if its answer is a stream that can go on elsewhere: one choice of plain text, whose tokens depend on
    nothing but the tokens before them."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict) or fields.get("stream") is not True or not fields:
        return None
    if not all(_allowed(name, value) for name, value in fields.items()):
        return None
    chat = path == CHAT
    if fields.get("seed") is not None and fields.get("temperature") != 0:
        return None
    offered = chat and fields.get("tools") and fields.get("tool_choice") != "none"
    if offered and not _is_plain_offer(fields):
        return None
    if not (_is_text(fields.get("messages")) if chat else _is_single(fields.get("prompt"))):
        return None
    limit = fields.get("max_tokens") if not chat else fields.get("max_completion_tokens") or fields.get("max_tokens")
    numbers = (limit, fields.get("min_tokens"))
    if any(number is not None and type(number) is not int for number in numbers):
        return None
    stop = fields.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    if not all(isinstance(one, str) and one for one in stops) or (stops and (offered or fields.get("min_tokens"))):
        return None
    options = fields.get("stream_options")
    return StreamRequest(
        chat=chat,
        sampling={name: value for name, value in fields.items() if name in _REPEATED and value is not None},
        max_tokens=limit if chat or limit is not None else COMPLETION_TOKENS,
        min_tokens=fields.get("min_tokens") or 0,
        shows_ids=fields.get("return_token_ids") is True,
        counts=isinstance(options, dict) and options.get("include_usage") is True,
        skips_special=fields.get("skip_special_tokens") is not False,
        stops=stops,
        offered_tools=fields if offered else None,
    )


def asking_for_ids(body: bytes) -> bytes:
    """The body, a JSON object, with `return_token_ids` as its last field, which prevails over an earlier one."""
    return body[: body.rindex(b"}")] + b',"return_token_ids":true}'


def _allowed(name: str, value: object) -> bool:
    if name in _REPEATED or name in _OVER or value is None or name == "seed":
        return True
    neutral = _NEUTRAL.get(name)
    if neutral is None:
        return value is False or value in ("", [], {})
    return any(value is one or (type(value) is not bool and value == one) for one in neutral)


def _is_text(messages: object) -> bool:
    """Whether no message holds anything but text: an image is not among the token ids of the prompt."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    return all(
        content is None
        or isinstance(content, str)
        or (isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content))
        for content in contents
    )


def _is_plain_offer(fields: Mapping[str, Any]) -> bool:
    """Whether the model may call the tools but is not made to, by the choice or by a schema."""
    strict = any(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) and tool["function"].get("strict")
        for tool in fields["tools"]
    )
    return fields.get("tool_choice") in (None, "auto") and not strict and not fields.get("continue_final_message")


def _is_single(prompt: object) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt))
