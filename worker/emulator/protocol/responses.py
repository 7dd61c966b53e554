"""The body of POST /v1/responses, with its fields in the order in which vLLM checks them.

For `input` items and `tools` OpenAI has dozens of types, which vLLM takes from OpenAI's client library, and so does
`openai_types`. `kvcache.chat.responses` makes messages of the items.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    input: str | list[Any]
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
    tool_choice: Any = "auto"
    tools: list[Any] = Field(default_factory=list)
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
            raise _unknown_tool()
    elif named:
        _resolve_choice(data, choice, tools)


def _unknown_tool() -> ApiError:
    return parameter_error("Tool choice 'function' not found in 'tools' parameter.", "tool_choice")


def _resolve_choice(data: dict[str, Any], choice: dict[str, Any], tools: Any) -> None:
    """Name the chosen tool as the model knows it: one of a namespace is `NAMESPACE__NAME`."""
    name = choice.get("name")
    if not name:
        raise _unknown_tool()
    names: set[str] = set()
    members: list[str] = []
    for tool in tools:
        fields = tool if isinstance(tool, dict) else {}
        if fields.get("type") != "namespace":
            names.add(str(fields.get("name")))
            continue
        space, inner = fields.get("name"), fields.get("tools")
        if not isinstance(inner, list) or not isinstance(space, str):
            return
        for member in inner:
            if isinstance(local := member.get("name") if isinstance(member, dict) else None, str):
                names.add(f"{space}__{local}")
                members += [f"{space}__{local}"] if local == name else []
    if name in names:
        return
    if not members:
        raise _unknown_tool()
    if len(members) > 1:
        raise parameter_error(
            f"Tool choice '{name}' is ambiguous: it is defined in more than one namespace ({', '.join(members)}). "
            "Select it by its full '<namespace>__<name>' name.",
            "tool_choice",
        )
    data["tool_choice"] = {**choice, "name": members[0]}


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


def shown_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools as a response repeats them."""
    return [
        {**_FUNCTION, **tool} if isinstance(tool, dict) else tool.model_dump(mode="json", by_alias=True)
        for tool in tools
    ]


# --- bodies that need none of OpenAI's types ---


def is_plain(body: Any) -> bool:
    """Whether a body's items and tools are of the few plainest shapes, which OpenAI's types accept. Only other bodies
    are validated by these types (`openai_types`), which take 0.6 s to load."""
    if not isinstance(body, dict):
        return True
    given, tools = body.get("input"), body.get("tools")
    items = given if isinstance(given, list) else ()
    functions = tools if isinstance(tools, list) else ()
    return (
        not isinstance(given, dict)
        and body.get("tool_choice", "auto") in ("none", "auto", "required")
        and all(map(_is_plain_item, items))
        and all(map(_is_plain_function, functions))
    )


def _is_plain_item(item: Any) -> bool:
    match item:
        case {"type": "function_call", "call_id": str(), "name": str(), "arguments": str(), **rest}:
            return not rest
        case {"type": "function_call_output", "call_id": str(), "output": str(), **rest}:
            return not rest
        case {"role": "user" | "assistant" | "system" | "developer", "content": str(), **rest}:
            return not rest or rest == {"type": "message"}
        case {"role": "user" | "system" | "developer", "content": [*parts], **rest}:
            return (not rest or rest == {"type": "message"}) and all(map(_is_plain_part, parts))
        case _:
            return False


def _is_plain_part(part: Any) -> bool:
    match part:
        case {"type": "input_text", "text": str(), **rest}:
            return not rest
        case _:
            return False


def _is_plain_function(tool: Any) -> bool:
    match tool:
        case {"type": "function", "name": str(), **rest}:
            fields: dict[str, type | tuple[type, ...]] = {"description": str, "parameters": dict, "strict": bool}
            return all(name in fields and isinstance(value, fields[name]) for name, value in rest.items())
        case _:
            return False
