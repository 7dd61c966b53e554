"""A body of Anthropic's Messages API as the chat request that vLLM 0.32 makes of it
(`vllm/entrypoints/anthropic/serving.py`).

vLLM has no path of its own for these requests: they become chat requests, whose prompt `kvcache.chat.request` renders.
Router and emulated worker both convert by this module; `tests/real_vllm` and the prompts that were recorded of a real
engine hold it to vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from kvcache.chat.messages import kind
from kvcache.chat.request import ChatRequestError, checked

_BILLING = "x-anthropic-billing-header"
"""A line of a client that changes with every request. vLLM drops it, so that prefixes can be cached."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_ADDITION, _REMOVAL = "tool_addition", "tool_removal"
_SAME_NAME = ("model", "temperature", "top_p", "top_k", "cache_salt", "kv_transfer_params", "vllm_xargs",
              "chat_template_kwargs")  # fmt: skip
"""Fields that the chat API has under the same name."""


class Template(Protocol):
    """What the conversion depends on: two properties of the engine's chat template."""

    @property
    def merges_system(self) -> bool:
        """It refuses a system message that is not the first, so that all of them become one."""

    @property
    def disabled_thinking_effort(self) -> str:
        """The `reasoning_effort` that stands for `"thinking": {"type": "disabled"}`."""


def chat_fields(body: Mapping[str, Any], template: Template, call_id: str | None = None) -> dict[str, Any]:
    """The fields of the chat request. Raises `ChatRequestError` for a body that vLLM refuses or that cannot be read.

    `call_id` is the id of tool calls that have none, for which vLLM takes the time of day; without it such a call
    cannot be read. Only what decides the prompt is checked: vLLM validates the rest.
    """
    messages = checked(body, "messages", list)
    if messages is None:
        raise ChatRequestError("messages must be a list")
    merges = any(_role(message) == "system" for message in messages) and template.merges_system
    fields: dict[str, Any] = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    fields["messages"] = list(_messages(body, messages, merges, call_id))
    if (most := body.get("max_tokens")) is not None:
        fields |= {"max_tokens": most, "max_completion_tokens": most}
    if (stop := body.get("stop_sequences")) is not None:
        fields["stop"] = stop
    if body.get("stream"):
        fields |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    _add_effort(body, template, fields)
    _add_tools(body, messages, fields)
    return fields


def _add_effort(body: Mapping[str, Any], template: Template, fields: dict[str, Any]) -> None:
    config = checked(body, "output_config", dict) or {}
    form = checked(config, "format", dict) or {}
    if schema := form.get("schema"):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema, "name": "json_schema"}}
    if (effort := config.get("effort")) is not None:
        fields["reasoning_effort"] = effort
    thinking = checked(body, "thinking", dict) or {}
    if thinking.get("type") == "disabled":
        fields["reasoning_effort"] = template.disabled_thinking_effort
    elif thinking.get("type") == "enabled":
        fields["thinking_token_budget"] = thinking.get("budget_tokens")


# --- messages ---


def _messages(
    body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], merges: bool, call_id: str | None
) -> Iterator[dict[str, Any]]:
    system = list(_system_parts(body))
    if merges:
        inline = (_system_text(message) for message in messages if _role(message) == "system")
        system += [text for text in inline if text]
    if system:
        yield {"role": "system", "content": "".join(system)}
    for message in messages:
        role, content = _role(message), message.get("content")
        if role == "system":
            if not merges and (text := _system_text(message)):
                yield {"role": "system", "content": text}
        elif isinstance(content, str):
            yield {"role": role, "content": content}
        else:
            yield from _from_blocks(role, _blocks(message), call_id)


def _role(message: object) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("user", "assistant", "system"):
        raise ChatRequestError("a message must be an object whose role is user, assistant or system")
    return str(role)


def _blocks(fields: Mapping[str, Any], name: str = "content") -> list[Mapping[str, Any]]:
    """The blocks of a content. Raises `ChatRequestError` for anything else."""
    blocks = fields.get(name)
    if not isinstance(blocks, list):
        raise ChatRequestError(f"{name} must be text or a list of blocks, not {kind(blocks)}")
    for block in blocks:
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            raise ChatRequestError("a block must be an object that names its type")
    return blocks


def _system_parts(body: Mapping[str, Any]) -> Iterable[str]:
    system = body.get("system")
    if not system:
        return ()
    return (system,) if isinstance(system, str) else _texts(_blocks(body, "system"))


def _system_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return "" if content.startswith(_BILLING) else content
    return "".join(_texts(_blocks(message)))


def _texts(blocks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for block in blocks:
        text = checked(block, "text", str)
        if block["type"] == "text" and text and not text.startswith(_BILLING):
            yield text


def _from_blocks(role: str, blocks: Iterable[Mapping[str, Any]], call_id: str | None) -> Iterator[dict[str, Any]]:
    """One message; before it, as messages of their own, the tool results that a user's message holds."""
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in blocks:
        match block["type"]:
            case "text":
                if text := checked(block, "text", str):
                    parts.append({"type": "text", "text": text})
            case "image":
                if source := checked(block, "source", dict):
                    parts.append({"type": "image_url", "image_url": {"url": _url(source)}})
            case "thinking":
                if (thought := checked(block, "thinking", str)) is not None:
                    thoughts.append(thought)
            case "tool_use":
                calls.append(_call(block, call_id))
            case "tool_result" if role == "user":
                yield from _tool_results(block)
            case "tool_result":
                content = block.get("content")  # Python's own notation of a list of blocks, as in vLLM
                parts.append({"type": "text", "text": f"Tool result: {content or ''}"})
            case "redacted_thinking" | "tool_reference":
                pass
            case other:
                raise ChatRequestError(f"a block of type {other[:40]!r} is not read here")
    message: dict[str, Any] = {"role": role}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if parts:
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        message["content"] = parts[0]["text"] if alone else parts
    if role != "user" or parts:
        yield message


def _call(block: Mapping[str, Any], call_id: str | None) -> dict[str, Any]:
    name = checked(block, "id", str) or call_id
    if name is None:
        raise ChatRequestError("a tool_use block without an id gets one by the engine's clock")
    try:
        arguments = json.dumps(checked(block, "input", dict) or {})
    except RecursionError:
        raise ChatRequestError("a tool call's input is nested too deep") from None
    return {
        "id": name,
        "type": "function",
        "function": {"name": checked(block, "name", str) or "", "arguments": arguments},
    }


def _tool_results(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A tool's answer, then its images as a user's message, then the tools that it refers to."""
    content = block.get("content")
    texts: list[str] = [content] if isinstance(content, str) else []
    images: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    for item in () if content is None or isinstance(content, str) else _items(content):
        match item.get("type"):
            case "text":
                text = item.get("text", "")
                if not isinstance(text, str):
                    raise ChatRequestError("the text of a tool's answer must be a string")
                texts.append(text)
            case "image":
                source = item.get("source", {})
                if not isinstance(source, Mapping):
                    raise ChatRequestError("the source of an image must be an object")
                if url := _url(source):
                    images.append({"type": "image_url", "image_url": {"url": url}})
            case "tool_reference":
                if name := item.get("tool_name") or item.get("name"):
                    references.append({"type": "tool_reference", "name": name})
    call_id = checked(block, "tool_use_id", str) or ""
    yield {"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}
    if images:
        yield {"role": "user", "content": images}
    if references:
        yield {"role": "tool", "tool_call_id": call_id, "content": references}


def _items(content: object) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(item, Mapping) for item in content):
        raise ChatRequestError("a tool's answer must be text or a list of objects")
    return content


def _url(source: Mapping[str, Any]) -> Any:
    if source.get("type") == "url":
        return source.get("url", "")
    return f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"


# --- tools ---


def _add_tools(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], fields: dict[str, Any]) -> None:
    choice = checked(body, "tool_choice", dict, "tool_choice")
    if choice is not None:
        fields["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
        named = {"type": "function", "function": {"name": choice.get("name")}}
        fields["tool_choice"] = named if choice.get("type") == "tool" else _CHOICES.get(str(choice.get("type")))
    tools = _tools(body, messages)
    if tools is None:
        return
    fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
    if fields.get("tool_choice") is None:
        fields["tool_choice"] = "auto"


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = checked(tool, "input_schema", dict, "tools")
    if schema is None or not isinstance(tool.get("name"), str):
        raise ChatRequestError("a tool needs a name and an input_schema", "tools")
    return {
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": tool.get("strict"),
        "defer_loading": tool.get("defer_loading"),
    }


def _tools(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]] | None:
    """The tools in force at the end of the conversation, which may have added and removed some."""
    declared: list[Mapping[str, Any]] | None = checked(body, "tools", list, "tools")
    for tool in declared or ():
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
            raise ChatRequestError("a tool must be an object that has a name", "tools")
    changes = [
        block
        for message in messages
        if _role(message) == "system" and not isinstance(message.get("content"), str)
        for block in _blocks(message)
        if block["type"] in (_ADDITION, _REMOVAL)
    ]
    if not changes:
        return declared
    tools: dict[str, Mapping[str, Any]] = {tool["name"]: tool for tool in declared or ()}
    removed: set[str] = set()
    for block in changes:
        name = _change(block, tools)
        if block["type"] == _REMOVAL:
            removed.add(name)
        else:
            removed.discard(name)
    return [tool for name, tool in tools.items() if name not in removed]


def _change(block: Mapping[str, Any], tools: dict[str, Mapping[str, Any]]) -> str:
    """Apply one addition, or check one removal. Returns the tool's name."""
    change = checked(block, "tool", dict) or {}
    if change.get("type") == "tool_definition":
        definition = checked(change, "definition", dict) or {}
        if not isinstance(name := definition.get("name"), str):
            raise ChatRequestError("a tool must be an object that has a name", "tools")
        tools[name] = definition
        return name
    name = checked(change, "name", str) or ""
    if name not in tools:
        raise ChatRequestError(f"{block['type']} references tool {name!r}, which is not declared in tools", "tools")
    if block["type"] == _ADDITION:
        tools[name] = {**tools[name], "defer_loading": None}
    return name
