"""A chat request's messages as vLLM hands them to a chat template.

What vLLM's types name comes first in each object, in their order, and whatever else was sent follows: a template that
writes a whole message or tool call out (`tojson`) shows that order. Checked against vLLM 0.32, whose answers to several
hundred requests are in `tests/data/vllm/chat_prompts.json`. Audio and prompt embeddings are refused, and so are images
unless it is said what stands for them: what they become is decided by the model's own processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvcache.chat.content_format import ContentFormat
from kvcache.images import is_image

Message = dict[str, Any]

_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""The types of content parts that are text, and the field that holds it."""

_PART_FIELDS = frozenset(
    {
        "type", "text", "refusal", "thinking", "closed", "name", "image_url", "input_audio", "file", "audio_url",
        "video_url", "image_pil", "image_embeds", "audio_embeds", "video_embeds", "data", "uuid",
        "prompt_cache_breakpoint",
    }
)  # fmt: skip
"""Fields that a type of content part names; a template that takes parts as a list is shown the others too."""

_BILLING = "x-anthropic-billing-header"
"""vLLM drops this line of a client's system prompt: its value changes with every request."""


BY_TEMPLATE = ""
"""Stands for the placeholder that a template itself writes for an image, if it takes contents as lists of parts."""


class MessageError(ValueError):
    """The messages are none that vLLM would render, or cannot be read here; the message says why."""


def conversation(messages: Sequence[object], form: ContentFormat, placeholder: str | None = None) -> list[Message]:
    """The messages a template is rendered with. `placeholder` is the text that stands for each image of a user's
    message, `BY_TEMPLATE` where the template writes it; None: images are refused. Raises `MessageError`."""
    if placeholder == BY_TEMPLATE and form is ContentFormat.STRING:
        raise MessageError("this template takes contents as text, in which it writes no placeholders")
    return [_message(message, form, placeholder) for message in messages]


def without_developer(messages: Iterable[Message]) -> list[Message]:
    """For templates that know no developer role: it becomes the system, whose messages become one, the first."""
    converted = [_as_system(message) if message["role"] == "developer" else message for message in messages]
    if all(message["role"] != "system" for message in converted[1:]):
        return converted
    words = [_text_of(message["content"]) for message in converted if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(word for word in words if word)}
    return [merged, *(message for message in converted if message["role"] != "system")]


def _as_system(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def _message(message: object, form: ContentFormat, placeholder: str | None) -> Message:
    if not isinstance(message, dict | Mapping):  # an object of JSON is found to be a dict at once
        raise MessageError(f"a message must be an object, not {kind(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise MessageError("a message needs a role, a string")
    read: Message = {"role": role, "content": _content(role, message.get("content"), form, placeholder)}
    if role == "assistant":
        _assistant(read, message)
    elif role == "tool":
        if "tool_call_id" in message:
            read["tool_call_id"] = message["tool_call_id"]
        read["content"] = _tool_content(read["content"])
    for name in ("name", "task"):
        if isinstance(value := message.get(name), str):
            read[name] = value
    if role == "developer":
        read["tools"] = message.get("tools")
    return read


def _assistant(read: Message, message: Mapping[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise MessageError(f"tool_calls must be a list, not {kind(calls)}")
    if calls:
        read["tool_calls"] = [_tool_call(call) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise MessageError(f"reasoning must be a string, not {kind(reasoning)}")
        read["reasoning"] = read["reasoning_content"] = reasoning


def _tool_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(call, dict) and isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
        return call  # in its final form, as `kvcache.chat.responses` makes it
    if not (
        isinstance(call, Mapping)
        and isinstance(function, Mapping)
        and call.get("type") == "function"
        and isinstance(call.get("id"), str)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str)
    ):
        raise MessageError('a tool call must look like {"id", "type": "function", "function": {"name", "arguments"}}')
    arguments = {"arguments": call_arguments(function["arguments"]), "name": function["name"]}
    return _ordered({"id": call["id"], "function": _ordered(arguments, function), "type": "function"}, call)


def _ordered(named: dict[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    """The named fields, then the others as they came."""
    return named | {name: value for name, value in sent.items() if name not in named}


def call_arguments(text: str) -> dict[str, Any]:
    """Templates take a tool call's arguments as an object; what is none is an empty one. Raises `MessageError`."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    except RecursionError:
        raise MessageError("a tool call's arguments are nested too deep") from None
    return parsed if isinstance(parsed, dict) else {}


def _content(role: str, content: object, form: ContentFormat, placeholder: str | None) -> str | list[dict[str, Any]]:
    if isinstance(content, str) and form is ContentFormat.STRING and role != "system":
        return content
    if content is None:
        parts: list[object] = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
    else:
        raise MessageError(f"a message's content must be a string or a list of parts, not {kind(content)}")
    if role == "system":
        parts = list(_without_billing(parts))
    if placeholder is not None and role == "user" and any(map(is_image, parts)):
        return _with_images(parts, form, placeholder)
    if form is ContentFormat.STRING:
        return "\n".join(text for part in parts if (text := _part_text(part)))  # vLLM passes empty parts over
    return [_part(part) for part in parts]


def _with_images(parts: list[object], form: ContentFormat, placeholder: str) -> str | list[dict[str, Any]]:
    """As text, the placeholders that the text does not have already come first, a line each (vLLM:
    `_get_full_multimodal_text_prompt`)."""
    if form is not ContentFormat.STRING:
        image = {"type": "text", "text": placeholder} if placeholder else {"type": "image"}
        return [dict(image) if is_image(part) else _part(part) for part in parts]
    text = "\n".join(text for part in parts if not is_image(part) and (text := _part_text(part)))
    missing = sum(map(is_image, parts)) - text.count(placeholder)
    return "\n".join([*[placeholder] * missing, *([text] if text else [])])


def _without_billing(parts: Iterable[object]) -> Iterable[object]:
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not (isinstance(text, str) and text.startswith(_BILLING)):
            yield part
        elif rest := text.partition("\n")[2]:
            yield rest if isinstance(part, str) or not isinstance(part, Mapping) else {**part, "text": rest}


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    form = part.get("type") if isinstance(part, Mapping) else None
    field = "name" if form == "tool_reference" else _TEXT_FIELDS.get(form) if isinstance(form, str) else None
    text = part.get(field) if isinstance(part, Mapping) and field else None
    if not isinstance(text, str):
        what = f"one of type {form[:40]!r}" if isinstance(form, str) else kind(part)
        raise MessageError(f'a part of a content must look like {{"type": "text", "text": "..."}}, not {what}')
    return text


def _part(part: object) -> dict[str, Any]:
    text = _part_text(part)
    if not isinstance(part, Mapping):
        return {"type": "text", "text": text}
    if part["type"] == "tool_reference":
        return {"type": "tool_reference", "name": text}
    extra = {name: value for name, value in part.items() if name not in _PART_FIELDS}
    return {"type": "text", "text": text, **extra}


def _tool_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A tool's answer in parts is text to a template, unless it refers to tools."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "\n".join(part["text"] for part in content)


def kind(value: object) -> str:
    """A value by its type alone: what a client sent may be huge, or nested too deep to be written out."""
    return type(value).__name__
