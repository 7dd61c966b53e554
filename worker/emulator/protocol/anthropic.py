"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, as vLLM takes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from worker.emulator.protocol.base import MAX_STOP_STRINGS, DeferredModel, ExtraArguments

TOOL_CHANGES = ("tool_addition", "tool_removal")
Effort = Literal["low", "medium", "high", "xhigh", "max"]
Display = Literal["summarized", "omitted", "updates"]


class Tool(DeferredModel):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: bool | None = None

    @field_validator("input_schema")
    @classmethod
    def _typed(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "type": "object"} if "type" not in value else value


class ToolReference(DeferredModel):
    type: Literal["tool_reference"]
    name: str


class ToolDefinition(DeferredModel):
    type: Literal["tool_definition"]
    definition: Tool


class ContentBlock(DeferredModel):
    """A part of a message."""

    type: Literal[
        "text",
        "image",
        "tool_use",
        "tool_result",
        "tool_reference",
        "thinking",
        "redacted_thinking",
        "tool_addition",
        "tool_removal",
    ]
    text: str | None = None
    source: dict[str, Any] | None = None
    id: str | None = None
    tool_use_id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    tool_name: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    tool: Annotated[ToolReference | ToolDefinition, Field(discriminator="type")] | None = None

    @model_validator(mode="after")
    def _check(self) -> ContentBlock:
        if self.type not in TOOL_CHANGES:
            return self
        if self.tool is None:
            raise ValueError(f"tool is required for {self.type} blocks")
        if self.type == "tool_removal" and self.tool.type != "tool_reference":
            raise ValueError("tool_removal only accepts a tool_reference")
        return self


def _no_tool_changes(content: str | list[ContentBlock] | None) -> str | list[ContentBlock] | None:
    for block in content if isinstance(content, list) else ():
        if block.type in TOOL_CHANGES:
            raise ValueError(f'{block.type} blocks are only allowed in messages with role "system"')
    return content


class Message(DeferredModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.role != "system":
            _no_tool_changes(self.content)
        return self


class ToolChoice(DeferredModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> ToolChoice:
        if self.type == "tool" and not self.name:
            raise ValueError("tool_choice.name is required when type is 'tool'")
        return self


class JsonOutputFormat(DeferredModel):
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(DeferredModel):
    effort: Effort | None = None
    format: JsonOutputFormat | None = None


class ThinkingEnabled(DeferredModel):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1024)
    display: Display | None = None


class ThinkingDisabled(DeferredModel):
    type: Literal["disabled"]


class ThinkingAdaptive(DeferredModel):
    type: Literal["adaptive"]
    display: Display | None = None


Thinking = Annotated[ThinkingEnabled | ThinkingDisabled | ThinkingAdaptive, Field(discriminator="type")]


def _named(value: str) -> str:
    if not value:
        raise ValueError("Model is required")
    return value


ModelName = Annotated[str, AfterValidator(_named)]
System = Annotated[str | list[ContentBlock] | None, AfterValidator(_no_tool_changes)]


class MessagesRequest(DeferredModel):
    """Body of POST /v1/messages."""

    model: ModelName
    messages: list[Message]
    max_tokens: int
    metadata: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = False
    system: System = None
    temperature: float | None = None
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = None
    top_k: int | None = None
    top_p: float | None = None
    mm_payload: Literal["tensors", "none"] = "tensors"
    return_mm_kwargs: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    watermarking: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    vllm_xargs: ExtraArguments | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("max_tokens")
    @classmethod
    def _max_tokens(cls, value: int) -> int:
        if value <= 0:
            raise ValueError("max_tokens must be positive")
        return value

    @model_validator(mode="after")
    def _budget(self) -> MessagesRequest:
        if self.kv_transfer_params and self.kv_transfer_params.get("do_remote_decode"):
            return self
        if isinstance(self.thinking, ThinkingEnabled) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("thinking.budget_tokens must be less than max_tokens")
        return self


class CountTokensRequest(DeferredModel):
    """Body of POST /v1/messages/count_tokens."""

    model: ModelName
    messages: list[Message]
    output_config: OutputConfig | None = None
    system: System = None
    thinking: Thinking | None = None
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
