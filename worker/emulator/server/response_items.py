"""Items of the Responses API as chat messages, and its tools as a chat's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcache.errors import ApiError, parameter_error

Message = dict[str, Any]

_FUNCTION = {
    "name": None,
    "parameters": None,
    "strict": None,
    "type": "function",
    "allowed_callers": None,
    "async": None,
    "defer_loading": None,
    "description": None,
    "output_schema": None,
}
"""A function tool as OpenAI's types write it out: every field, in their order."""


def chat_messages(
    instructions: str | None,
    given: str | Sequence[Mapping[str, Any]],
    history: Sequence[Message] = (),
    output: Sequence[Mapping[str, Any]] = (),
) -> list[Message]:
    """The conversation: `history` and `output` are a previous response's messages and items. Raises `ApiError`."""
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    messages += [message for message in history if message.get("role") != "system"]
    messages += [
        {"role": "assistant", "content": part["text"]} for item in output for part in item.get("content") or ()
    ]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    new: list[Message] = []
    for item in given:
        _add(item, new)
    return messages + new


def _add(item: Mapping[str, Any], messages: list[Message]) -> None:
    """One more item: a message, or more of the assistant's last one."""
    last = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
    kind, role = item.get("type"), item.get("role")
    if kind in ("function_call", "custom_tool_call"):
        call = {
            "id": item.get("call_id"),
            "function": {"name": item.get("name"), "arguments": item.get("arguments", "{}")},
            "type": "function",
        }
        if last is not None:
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "reasoning":
        _extend(messages, last, "reasoning", _reasoning(item))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
    elif role == "assistant" and (text := _first_text(item.get("content"))) is not None:
        _extend(messages, last, "content", text)
    elif role is not None:
        messages.append(dict(item))
    else:
        raise parameter_error(f"Unsupported input item type: {kind}", "input")


def _extend(messages: list[Message], last: Message | None, name: str, text: str) -> None:
    if last is not None and last.get(name) is None:
        last[name] = text
    else:
        messages.append({"role": "assistant", name: text})


def _reasoning(item: Mapping[str, Any]) -> str:
    if item.get("encrypted_content"):
        raise parameter_error("Encrypted content is not supported.", "input")
    parts = item.get("content") or item.get("summary") or ()
    return str(parts[0].get("text", "")) if parts else ""


def _first_text(content: object) -> str | None:
    if isinstance(content, str):
        return content
    first = content[0] if isinstance(content, list) and content else None
    text = first.get("text") if isinstance(first, Mapping) else None
    return text if isinstance(text, str) else None


def continues(given: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last item is an assistant's message that is to be continued."""
    if isinstance(given, str) or not given:
        return False
    last = given[-1]
    return last.get("type", "message") in ("message", "reasoning") and last.get("status") in (
        "in_progress",
        "incomplete",
    )


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The function tools, in the form of the chat API."""
    fields = ("name", "description", "parameters", "strict", "defer_loading")
    return [
        {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}
        for tool in tools
        if tool.get("type") == "function"
    ]


def shown_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools as a response repeats them. Raises `ApiError` for what is none."""
    for tool in tools:
        if not isinstance(tool.get("type"), str) or (
            tool["type"] == "function" and not isinstance(tool.get("name"), str)
        ):
            raise ApiError(
                400, "A tool has a `type`, and a function has a `name`.", param="body.tools", type="Bad Request"
            )
    return [{**_FUNCTION, **tool} if tool["type"] == "function" else dict(tool) for tool in tools]
