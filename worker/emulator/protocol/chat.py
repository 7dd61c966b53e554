"""The bodies of POST /v1/chat/completions and of its batch form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvcache.errors import ApiError, parameter_error
from worker.emulator.protocol.base import (
    INT64_MAX,
    INT64_MIN,
    DeferredModel,
    ExtraArguments,
    RepetitionDetectionParams,
    Seed,
    Stop,
    StreamOptions,
    ThinkingTokenBudget,
    TopLogprobs,
    UnionMember,
    WireModel,
    check_cache_salt,
    check_count,
    check_prompt_logprobs,
    check_stream_options,
    random_id,
)
from worker.emulator.protocol.messages import ChatMessage, normalise_messages, read_tool_calls
from worker.emulator.protocol.structured_outputs import (
    AnyResponseFormat,
    StructuredOutputsParams,
    check_response_format,
    check_structural_tag,
    count_constraints,
)

_USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'


class FunctionDefinition(WireModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolParam(WireModel):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    defer_loading: bool | None = None


class NamedFunction(WireModel):
    name: str


class NamedToolChoice(UnionMember):
    """`tool_choice` that names one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


_PROMPT_FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "truncate_prompt_tokens",
    "truncation_side",
    "max_tokens",
    "max_completion_tokens",
    "kv_transfer_params",
    "echo",
)


def prompt_fields(request: WireModel, names: Sequence[str]) -> dict[str, Any]:
    """The named fields of a request as JSON, without those that are None or empty. Messages are left as they came."""
    found = {name: value for name in names if (value := getattr(request, name)) not in (None, [])}
    for name, value in found.items():
        if name == "tools":
            found[name] = [tool.model_dump(exclude_unset=True) for tool in value]
        elif isinstance(value, WireModel):
            found[name] = value.model_dump()
    return found


class ChatCompletionRequest(WireModel):
    """Body of POST /v1/chat/completions, with its fields in the order in which vLLM checks them."""

    messages: list[ChatMessage]
    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: TopLogprobs = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    presence_penalty: float | None = None
    response_format: AnyResponseFormat | None = None
    seed: Seed = None
    stop: Stop = Field(default_factory=list)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ToolParam] | None = None
    tool_choice: Literal["none"] | Literal["auto"] | Literal["required"] | NamedToolChoice | None = "none"
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: ThinkingTokenBudget = None
    include_reasoning: bool = True
    parallel_tool_calls: bool | None = True
    user: str | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    watermarking: bool | None = None
    length_penalty: float = 1.0
    stop_token_ids: list[int] | None = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    priority: int = Field(0, ge=INT64_MIN, le=INT64_MAX)
    request_id: str = Field(default_factory=random_id)
    session_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    routed_experts_prompt_start: int = Field(0, ge=0)
    return_token_offsets: bool | None = False
    return_prompt_text: bool | None = None
    mm_payload: Literal["tensors", "none"] = "tensors"
    return_mm_kwargs: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    vllm_xargs: ExtraArguments | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """The checks that vLLM makes before those of the fields' types, in its order."""
        if not isinstance(data, dict):
            return data
        iter(data.get("messages", []))  # raises what vLLM's own loop over them raises
        check_generation_prompt(data)
        _check_tools(data)
        _check_structured(data)
        _check_logprobs(data)
        check_stream_options(data)
        check_response_format(data)
        normalise_messages(data)
        check_cache_salt(data)
        return data

    @model_validator(mode="after")
    def _read(self) -> ChatCompletionRequest:
        read_tool_calls(self.messages)
        return self

    def prompt_fields(self) -> dict[str, Any]:
        """The fields that determine the prompt, as `kvcache.chat.request` reads them."""
        return prompt_fields(self, _PROMPT_FIELDS)

    @property
    def choices(self) -> int:
        """Number of answers to the conversation."""
        return 1 if self.n is None else self.n

    @property
    def asked_logprobs(self) -> int | None:
        """Number of likeliest tokens whose log probabilities are reported with each token; None: none are reported."""
        return self.top_logprobs if self.logprobs else None

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """The same for the prompt. An echo asks for them, too."""
        return self.top_logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs

    @property
    def only_echo(self) -> bool:
        return False

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens`, or else its older name `max_tokens`; None: as many as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def output_limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class BatchChatCompletionRequest(DeferredModel):
    """Body of POST /v1/chat/completions/batch: one answer to each of several conversations."""

    messages: list[Annotated[list[ChatMessage], Field(min_length=1)]] = Field(..., min_length=1)
    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: TopLogprobs = 0
    logprob_token_ids: list[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    presence_penalty: float | None = None
    response_format: Any | None = None
    seed: Seed = None
    stop: Stop = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    tool_choice: Literal["none"] | None = "none"
    include_reasoning: bool = True
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    watermarking: bool | None = None
    length_penalty: float | None = 1.0
    early_stopping: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    request_id: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    priority: int = Field(0, ge=INT64_MIN, le=INT64_MAX)
    cache_salt: str | None = None
    include_stop_str_in_output: bool = False
    guided_decoding_backend: str | None = None
    echo: bool = False
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("use_beam_search"):
            raise parameter_error(
                "Batch chat completions do not support beam search. Please set `use_beam_search` to False.",
                "use_beam_search",
            )
        if data.get("logprob_token_ids") and not data.get("logprobs"):
            raise parameter_error(
                "when using `logprob_token_ids`, `logprobs` must be set to true.", "logprob_token_ids"
            )
        if data.get("structured_outputs") is not None:
            check_structural_tag(data["structured_outputs"])
        n = data.get("n", 1)
        if n is not None and n != 1:
            raise parameter_error("Batch chat completions do not support `n > 1`. Please set `n` to 1.", "n", n)
        return data

    def requests(self) -> list[ChatCompletionRequest]:
        """One chat request for each conversation. Raises the errors of validating it."""
        shared = self.model_dump(exclude={"messages"}, exclude_none=True)
        return [ChatCompletionRequest.model_validate({**shared, "messages": one}) for one in self.messages]


def check_generation_prompt(data: dict[str, Any]) -> None:
    """Raises `ApiError` for a conversation that continues its last message and also begins a new one."""
    if data.get("continue_final_message") and data.get("add_generation_prompt"):
        raise ApiError(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")


def _check_structured(data: dict[str, Any]) -> None:
    structured = data.get("structured_outputs")
    if structured is None:
        return
    given = count_constraints(structured)
    if given > 1:
        raise ApiError(
            400, "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice')."
        )
    if given > 0 and data.get("tool_choice", "none") not in ("none", "auto", "required"):
        raise ApiError(400, "You can only either use constraints for structured outputs or tools, not both.")
    check_structural_tag(structured)


def _check_logprobs(data: dict[str, Any]) -> None:
    if data.get("logprob_token_ids"):
        if data.get("use_beam_search"):
            raise parameter_error("`logprob_token_ids` is not supported with beam search.", "logprob_token_ids")
        if not data.get("logprobs"):
            raise parameter_error(
                "when using `logprob_token_ids`, `logprobs` must be set to true.", "logprob_token_ids"
            )
    check_prompt_logprobs(data, "top_logprobs")
    top = data.get("top_logprobs")
    if top is None:
        return
    check_count("top_logprobs", top)
    if (top == -1 or top > 0) and not data.get("logprobs"):
        raise parameter_error("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")


def _check_tools(data: dict[str, Any]) -> None:
    if data.get("tools") == []:
        raise parameter_error(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools"
        )
    if "tool_choice" not in data and data.get("tools"):
        data["tool_choice"] = "auto"
    choice = data.get("tool_choice")
    if choice is None or choice == "none":
        return
    if data.get("tools") is None:
        raise parameter_error("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if choice not in ("auto", "required") and not isinstance(choice, dict):
        raise parameter_error(
            f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )
    if isinstance(choice, dict):
        _check_named_tool(choice, data["tools"])


def _check_named_tool(choice: dict[str, Any], tools: Any) -> None:
    function = choice.get("function")
    if not isinstance(function, dict):
        raise parameter_error(
            f"Invalid value for `function`: `{function}` in `tool_choice`! {_USAGE}", "tool_choice.function"
        )
    if "name" not in function:
        raise parameter_error(
            f"Expected field `name` in `function` in `tool_choice`! {_USAGE}", "tool_choice.function.name"
        )
    name = function["name"]
    if not isinstance(name, str) or not name:
        raise parameter_error(
            f"Invalid `name` in `function`: `{name}` in `tool_choice`! {_USAGE}", "tool_choice.function.name"
        )
    if not any(tool["function"]["name"] == name for tool in tools):
        raise parameter_error(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )
