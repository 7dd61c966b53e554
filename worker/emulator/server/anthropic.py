"""Converts requests of Anthropic's API to chat requests, as vLLM does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kvcache.errors import ApiError
from worker.emulator.protocol.anthropic import (
    TOOL_CHANGES,
    ContentBlock,
    CountTokensRequest,
    Message,
    MessagesRequest,
    ThinkingDisabled,
    ThinkingEnabled,
    Tool,
    ToolDefinition,
)
from worker.emulator.protocol.base import StreamOptions
from worker.emulator.protocol.chat import ChatCompletionRequest, NamedToolChoice, ToolParam
from worker.emulator.protocol.structured_outputs import ResponseFormat

_BILLING = "x-anthropic-billing-header"
"""A line of a client that changes with every request. vLLM drops it, so that prefixes can be cached."""

RenderChat = Callable[[Mapping[str, Any]], str | None]
"""Renders a chat request's prompt; None if the chat template refuses it."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(request: MessagesRequest | CountTokensRequest, render: RenderChat) -> ChatCompletionRequest:
    """The chat request. `render` is used to find out what the chat template supports. Raises `ApiError`."""
    merge = any(message.role == "system" for message in request.messages) and _needs_system_first(render)
    chat = ChatCompletionRequest.model_validate(_base(request, _messages(request, merge)))
    if isinstance(request, MessagesRequest) and request.stream:
        chat.stream = request.stream
        chat.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    _output(request, chat)
    if isinstance(request.thinking, ThinkingDisabled):
        chat.reasoning_effort = "none" if _heeds_no_thinking(render) else "low"
    elif isinstance(request.thinking, ThinkingEnabled):
        chat.thinking_token_budget = request.thinking.budget_tokens
    _choose_tools(request, chat)
    return chat


def _base(request: MessagesRequest | CountTokensRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    if isinstance(request, MessagesRequest):
        base |= {
            "max_tokens": request.max_tokens,
            "max_completion_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "cache_salt": request.cache_salt,
            "kv_transfer_params": request.kv_transfer_params,
            "vllm_xargs": request.vllm_xargs,
        }
    return base


def _output(request: MessagesRequest | CountTokensRequest, chat: ChatCompletionRequest) -> None:
    config = request.output_config
    if config is None:
        return
    if config.format is not None and config.format.json_schema:
        schema = {"schema": config.format.json_schema, "name": config.format.type}
        chat.response_format = ResponseFormat.model_validate({"type": config.format.type, "json_schema": schema})
    if config.effort is not None:
        chat.reasoning_effort = config.effort


def _choose_tools(request: MessagesRequest | CountTokensRequest, chat: ChatCompletionRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        chat.tool_choice = None
    elif choice.type == "tool":
        chat.tool_choice = NamedToolChoice.model_validate({"function": {"name": choice.name}})
    else:
        chat.tool_choice = _CHOICES[choice.type]  # type: ignore[assignment]  # one of its literals
    tools = _tools(request)
    if tools is None:
        return
    chat.tools = [
        ToolParam.model_validate(
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                    "defer_loading": tool.defer_loading,
                },
            }
        )
        for tool in tools
    ]
    if chat.tool_choice is None:
        chat.tool_choice = "auto"


def _tools(request: MessagesRequest | CountTokensRequest) -> list[Tool] | None:
    """The tools in force at the end of the conversation, which may have added and removed some."""
    changes = [
        block
        for message in request.messages
        for block in (message.content if isinstance(message.content, list) else ())
        if block.type in TOOL_CHANGES
    ]
    if not changes:
        return request.tools
    tools = {tool.name: tool for tool in request.tools or ()}
    removed: set[str] = set()
    for block in changes:
        change = block.tool
        if isinstance(change, ToolDefinition):
            name = change.definition.name
            tools[name] = change.definition
        else:
            name = "" if change is None else change.name
            if name not in tools:
                raise ApiError(400, f"{block.type} references tool {name!r}, which is not declared in tools")
            if block.type == "tool_addition":
                tools[name] = tools[name].model_copy(update={"defer_loading": None})
        if block.type == "tool_removal":
            removed.add(name)
        else:
            removed.discard(name)
    return [tool for name, tool in tools.items() if name not in removed]


def _messages(request: MessagesRequest | CountTokensRequest, merge_system: bool) -> list[dict[str, Any]]:
    system = [request.system] if isinstance(request.system, str) and request.system else []
    if isinstance(request.system, list):
        system += [text for block in request.system if (text := _unbilled(block))]
    if merge_system:
        system += [text for message in request.messages if message.role == "system" if (text := _system(message))]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "".join(system)}] if system else []
    for message in request.messages:
        if message.role == "system":
            text = None if merge_system else _system(message)
            messages += [{"role": "system", "content": text}] if text else []
        elif isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        else:
            _add_blocks(message.role, message.content, messages)
    return messages


def _unbilled(block: ContentBlock) -> str | None:
    return block.text if block.type == "text" and block.text and not block.text.startswith(_BILLING) else None


def _system(message: Message) -> str | None:
    if isinstance(message.content, str):
        return None if message.content.startswith(_BILLING) else message.content
    return "".join(text for block in message.content if (text := _unbilled(block))) or None


def _add_blocks(role: str, blocks: list[ContentBlock], messages: list[dict[str, Any]]) -> None:
    """Append a message of several parts. A user's tool results become separate messages before it."""
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    reasoning: list[str] = []
    for block in blocks:
        if block.type == "text" and block.text:
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image" and block.source:
            parts.append({"type": "image_url", "image_url": {"url": _url(block.source)}})
        elif block.type == "thinking" and block.thinking is not None:
            reasoning.append(block.thinking)
        elif block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
            calls.append({"id": block.id or "call_0", "type": "function", "function": function})
        elif block.type == "tool_result" and role == "user":
            messages += _tool_result(block)
        elif block.type == "tool_result":
            parts.append({"type": "text", "text": f"Tool result: {block.content or ''}"})
    message: dict[str, Any] = {"role": role}
    if reasoning:
        message["reasoning"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    if parts:
        message["content"] = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    if role != "user" or "content" in message:
        messages.append(message)


def _tool_result(block: ContentBlock) -> list[dict[str, Any]]:
    items = block.content if isinstance(block.content, list) else []
    text = block.content if isinstance(block.content, str) else ""
    text = text or "\n".join(item.get("text", "") for item in items if item.get("type") == "text")
    found: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": block.tool_use_id or "", "content": text}]
    images = [_url(item.get("source", {})) for item in items if item.get("type") == "image"]
    if images:
        found.append(
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}} for image in images]}
        )
    names = [item.get("tool_name") or item.get("name") for item in items if item.get("type") == "tool_reference"]
    references = [{"type": "tool_reference", "name": name} for name in names if name]
    if references:
        found.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": references})
    return found


def _url(source: Mapping[str, Any]) -> str:
    if source.get("type") == "url":
        return str(source.get("url", ""))
    return f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"


def _needs_system_first(render: RenderChat) -> bool:
    """Whether the chat template accepts system messages only at the beginning."""
    turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
    return render({"messages": turns, "add_generation_prompt": False}) is None


def _heeds_no_thinking(render: RenderChat) -> bool:
    """Whether the chat template renders the effort "none" differently from every other effort."""
    hi = [{"role": "user", "content": "Hi"}]
    none = render({"messages": hi, "reasoning_effort": "none"})
    efforts = ("low", "medium", "high", "xhigh", "max")
    return none is not None and all(render({"messages": hi, "reasoning_effort": effort}) != none for effort in efforts)
