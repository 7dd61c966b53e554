"""A body of OpenAI's Responses API as the chat request that vLLM 0.32 makes of it
(`vllm/entrypoints/openai/responses/protocol.py` and `utils.py`, `vllm/tool_parsers/utils.py`).

Items become messages by what vLLM's types make of them: a text is that of the first part, several items of the
assistant become one message, and a message that is still in progress is continued. Router and emulated worker both
convert by this module; `tests/real_vllm` and the prompts that were recorded of a real engine hold it to vLLM.

Items and tools that vLLM accepts but cannot put into a prompt (files, references to items, calls of hosted tools) are
refused here too, as is what only the engine knows (`previous_response_id`). gpt-oss models, whose prompts vLLM builds
without a chat template, are not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvcache.chat.messages import MessageError, call_arguments, kind
from kvcache.chat.request import ChatRequestError, checked

Message = dict[str, Any]

_SAME_NAME = ("model", "stream", "temperature", "top_p", "cache_salt", "kv_transfer_params", "chat_template_kwargs",
              "tool_choice")  # fmt: skip
"""Fields that the chat API has under the same name."""

_CALLS = ("function_call", "custom_tool_call")
_ANSWERS = ("function_call_output", "custom_tool_call_output")
_UNFINISHED = ("in_progress", "incomplete")
_AUTHORS = ("user", "system", "developer")

_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The freeform text payload for this tool."}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Parameters of the function that a custom tool is shown as."""


def chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the chat request. Raises `ChatRequestError` for a body that vLLM refuses or that cannot be read.

    Only what decides the prompt is checked: vLLM validates the rest.
    """
    if body.get("previous_response_id") is not None:
        raise ChatRequestError("only the engine that stored a response can continue it", "previous_response_id")
    messages = opening(checked(body, "instructions", str, "instructions")) + input_messages(body)
    return {"messages": messages, **options(body)}


def options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the chat request without its messages. Raises `ChatRequestError`."""
    fields: dict[str, Any] = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    continued = _continues(body.get("input"))
    fields |= {"add_generation_prompt": not continued, "continue_final_message": continued, "add_special_tokens": True}
    if (most := body.get("max_output_tokens")) is not None:
        fields["max_tokens"] = most
    if body.get("truncation", "disabled") != "disabled":
        fields["truncate_prompt_tokens"] = -1
    reasoning = checked(body, "reasoning", dict, "reasoning") or {}
    if (effort := reasoning.get("effort")) is not None:
        fields["reasoning_effort"] = effort
    if tools := checked(body, "tools", list, "tools"):
        fields["tools"] = [{"type": "function", "function": function} for function in _functions(tools)]
    return fields


def opening(instructions: str | None) -> list[Message]:
    """The message that `instructions` become."""
    return [{"role": "system", "content": instructions}] if instructions else []


def input_messages(body: Mapping[str, Any]) -> list[Message]:
    """The messages that `input` becomes. Raises `ChatRequestError`."""
    given = body.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ChatRequestError(f"input must be text or a list of items, not {kind(given)}", "input")
    messages: list[Message] = []
    for item in given:
        if not isinstance(item, Mapping):
            raise ChatRequestError(f"an item must be an object, not {kind(item)}", "input")
        _add(item, messages)
    return messages


def _add(item: Mapping[str, Any], messages: list[Message]) -> None:
    """Append an item: as a message, or to the assistant's last message."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    name = item.get("type", "message")
    if name in _CALLS:
        call = _function_call(item) if name == "function_call" else _custom_call(item)
        if last is None:
            messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
    elif name == "reasoning":
        _extend(messages, last, "reasoning", _reasoning(item))
    elif name in _ANSWERS:
        messages.append({"role": "tool", "content": _content(item, "output"), "tool_call_id": item.get("call_id")})
    elif name != "message":
        raise ChatRequestError(f"Unsupported input item type: {name}", "input")
    elif item.get("role") == "assistant":
        _extend(messages, last, "content", _assistant_text(item))
    elif item.get("role") in _AUTHORS:
        messages.append({**item, "content": _content(item, "content")})
    else:
        raise ChatRequestError("a message's role is user, assistant, system or developer", "input")


def _extend(messages: list[Message], last: Message | None, name: str, text: str) -> None:
    if last is not None and last.get(name) is None:
        last[name] = text
    else:
        messages.append({"role": "assistant", name: text})


# --- parts of items ---


def _required(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ChatRequestError(f"an item of type {item.get('type')} needs {name}, a string", "input")
    return value


def _function_call(item: Mapping[str, Any]) -> dict[str, Any]:
    """A call in its final form: unlike a chat request's its function is named before its arguments."""
    name, arguments = _required(item, "name"), _required(item, "arguments")
    if namespace := checked(item, "namespace", str, "input"):
        name = _flat(namespace, name)
    try:
        function = {"name": name, "arguments": call_arguments(arguments)}
    except MessageError as error:
        raise ChatRequestError(str(error), "input") from None
    return {"id": _required(item, "call_id"), "function": function, "type": "function"}


def _custom_call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": _required(item, "name"), "arguments": {"input": _required(item, "input")}}
    return {"id": _required(item, "call_id"), "function": function, "type": "function"}


def _reasoning(item: Mapping[str, Any]) -> str:
    if item.get("encrypted_content"):
        raise ChatRequestError("Encrypted content is not supported.", "input")
    if not isinstance(item.get("summary"), list):
        raise ChatRequestError("an item of type reasoning needs a summary, a list", "input")
    for name in ("content", "summary"):
        for part in item.get(name) or ():
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                raise ChatRequestError(f"a part of {name} needs a text", "input")
            return text
    return ""


def _content(item: Mapping[str, Any], name: str) -> Any:
    """Text, or the parts as they are: what is no text is refused, or read, with the messages."""
    content = item.get(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise ChatRequestError(f"{name} must be text or a list of parts, not {kind(content)}", "input")
    return content


def _assistant_text(item: Mapping[str, Any]) -> str:
    """The text of the first part: vLLM passes the others over."""
    content = item.get("content")
    if isinstance(content, str):
        return content
    first = content[0] if isinstance(content, list) and content else None
    forms = ("input_text", "output_text") if "type" in item else ("input_text",)
    if not isinstance(first, Mapping) or first.get("type") not in forms or not isinstance(first.get("text"), str):
        raise ChatRequestError("a message of the assistant begins with a text", "input")
    return str(first["text"])


def _continues(given: object) -> bool:
    """Whether the last item is a message that the answer continues."""
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, Mapping) or last.get("type", "message") not in ("message", "reasoning"):
        return False
    return last.get("status") in _UNFINISHED


# --- tools ---


def _functions(tools: Sequence[object]) -> Iterator[dict[str, Any]]:
    """The tools that are functions, or shown as such. vLLM shows no others to a model."""
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool.get("type"), str):
            raise ChatRequestError("a tool must be an object that names its type", "tools")
        match tool["type"]:
            case "function":
                yield _function(tool)
            case "custom":
                yield _function({**tool, "parameters": _CUSTOM_PARAMETERS, "strict": None, "defer_loading": None})
            case "namespace":
                yield from _members(tool)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tool.get(name) for name in ("name", "description", "parameters", "strict", "defer_loading")}


def _members(namespace: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    name, members = namespace.get("name"), namespace.get("tools")
    if not isinstance(name, str) or not isinstance(members, list):
        raise ChatRequestError("a namespace needs a name and tools, a list", "tools")
    for member in members:
        if not isinstance(member, Mapping) or not isinstance(member.get("name"), str):
            raise ChatRequestError("a tool of a namespace must be an object that has a name", "tools")
        if member.get("type") == "function":
            yield _function({**member, "name": _flat(name, member["name"])})


def _flat(namespace: str, name: str) -> str:
    return f"{namespace}__{name}"
