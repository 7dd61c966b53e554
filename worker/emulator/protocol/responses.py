"""The body of POST /v1/responses, with its fields in the order in which vLLM checks them, and its items as chat
messages.

The shape of `input` items and `tools`, for which OpenAI has dozens of types, is checked only when they become messages.
vLLM refuses a wrong item with a list of every type that it is not; here such items are accepted, or refused more
briefly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from kvcache.errors import ApiError, parameter_error
from worker.emulator.protocol.base import (
    INT64_MAX,
    INT64_MIN,
    DeferredModel,
    ExtraArguments,
    Seed,
    Stop,
    TopLogprobs,
    UnionMember,
    check_cache_salt,
    random_id,
)
from worker.emulator.protocol.structured_outputs import StructuredOutputsParams

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)] | None
LOGPROBS = "message.output_text.logprobs"


class Reasoning(DeferredModel):
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    effort: Effort | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    mode: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseFormatText(DeferredModel):
    type: Literal["text"]


class ResponseFormatTextJSONSchemaConfig(DeferredModel):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    type: Literal["json_schema"]
    description: str | None = None
    strict: bool | None = None


class ResponseFormatJSONObject(DeferredModel):
    type: Literal["json_object"]


class TextConfig(DeferredModel):
    format: ResponseFormatText | ResponseFormatTextJSONSchemaConfig | ResponseFormatJSONObject | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ToolChoiceFunction(UnionMember):
    name: str
    type: Literal["function", "custom"]


class ResponsesRequest(DeferredModel):
    """Body of POST /v1/responses."""

    background: bool | None = False
    include: (
        list[
            Literal[
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
            ]
        ]
        | None
    ) = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    model: str | None = None
    logit_bias: dict[str, float] | None = None
    parallel_tool_calls: bool | None = True
    previous_response_id: str | None = None
    prompt: None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool = True
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] = "auto"
    store: bool | None = True
    stream: bool | None = False
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceFunction | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = Field(default_factory=list)
    top_logprobs: TopLogprobs = 0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    user: str | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    prompt_cache_key: str | None = None
    watermarking: bool | None = None
    request_id: str = Field(default_factory=lambda: f"resp_{random_id()}")
    session_id: str | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    priority: int = Field(0, ge=INT64_MIN, le=INT64_MAX)
    mm_payload: Literal["tensors", "none"] = "tensors"
    return_mm_kwargs: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    enable_response_messages: bool = False
    previous_input_messages: list[dict[str, Any]] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    repetition_penalty: float | None = None
    seed: Seed = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[int] | None = Field(default_factory=list)
    ignore_eos: bool = False
    vllm_xargs: ExtraArguments | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """The checks that vLLM makes before those of the fields' types, in its order."""
        if not isinstance(data, dict):
            return data
        _check_tools(data)
        if data.get("prompt") is not None:
            raise parameter_error("prompt template is not supported", "prompt")
        if data.get("background") and not data.get("store", True):
            raise parameter_error("background can only be used when `store` is true", "background")
        check_cache_salt(data)
        return data

    @property
    def wants_logprobs(self) -> bool:
        return self.include is not None and LOGPROBS in self.include

    def structured(self) -> StructuredOutputsParams | None:
        """The constraint on the output. Raises `ApiError`."""
        form = None if self.text is None else self.text.format
        if form is None:
            return self.structured_outputs
        if self.structured_outputs is not None:
            raise parameter_error("Cannot specify both structured_outputs and text.format", "structured_outputs")
        if isinstance(form, ResponseFormatJSONObject):
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=form.schema_) if form.type == "json_schema" else None


class ResponsesResponse(BaseModel):
    """Fields that an answer repeats and that must not be null. (The class name appears in error messages.)"""

    background: bool
    truncation: Literal["auto", "disabled"]


def _check_tools(data: dict[str, Any]) -> None:
    tools, choice = data.get("tools"), data.get("tool_choice", "auto")
    named = isinstance(choice, dict) and choice.get("type") in ("function", "custom")
    missing = parameter_error("Tool choice 'function' not found in 'tools' parameter.", "tool_choice")
    for tool in tools if isinstance(tools, list) else ():
        form = tool.get("format") if isinstance(tool, dict) else None
        if isinstance(form, dict) and form.get("type") == "grammar" and tool.get("type") == "custom":
            raise parameter_error(
                "Custom tools with a grammar format are not supported; only free-form text custom tools are accepted.",
                "tools",
            )
    if tools is None or not len(tools):
        if choice in ("auto", "none"):
            data["tool_choice"] = "none"
        elif choice == "required":
            raise parameter_error("Tool choice 'required' must be specified with 'tools' parameter.", "tool_choice")
        elif named:
            raise missing
    elif named and choice.get("name") not in [tool.get("name") for tool in tools if isinstance(tool, dict)]:
        raise missing


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
"""A function tool with every field of OpenAI's types, in their order."""


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
    """Append an item: as a message, or to the assistant's last message."""
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
    """Whether the last item is a message of the assistant that the answer continues."""
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
    """The tools as a response repeats them. Raises `ApiError` for an invalid tool."""
    for tool in tools:
        if not isinstance(tool.get("type"), str) or (
            tool["type"] == "function" and not isinstance(tool.get("name"), str)
        ):
            raise ApiError(
                400, "A tool has a `type`, and a function has a `name`.", param="body.tools", type="Bad Request"
            )
    return [{**_FUNCTION, **tool} if tool["type"] == "function" else dict(tool) for tool in tools]
