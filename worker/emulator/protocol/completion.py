"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvcache.errors import parameter_error
from worker.emulator.protocol.base import (
    INT64_MAX,
    INT64_MIN,
    MAX_COMPLETION_PROMPTS,
    ExtraArguments,
    RepetitionDetectionParams,
    Seed,
    Stop,
    StreamOptions,
    ThinkingTokenBudget,
    WireModel,
    check_cache_salt,
    check_count,
    check_prompt_logprobs,
    check_stream_options,
    random_id,
)
from worker.emulator.protocol.structured_outputs import (
    AnyResponseFormat,
    StructuredOutputsParams,
    check_response_format,
    check_structural_tag,
    count_constraints,
)

TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(WireModel):
    """Body of POST /v1/completions, with its fields in the order in which vLLM checks them."""

    MAX_TOKENS: ClassVar[int] = 16

    model: str | None = None
    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    echo: bool | None = False
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = MAX_TOKENS
    n: int = 1
    presence_penalty: float | None = None
    seed: Seed = None
    stop: Stop = Field(default_factory=list)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
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
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    prompt_embeds: bytes | list[bytes] | None = None
    add_special_tokens: bool = True
    response_format: AnyResponseFormat | None = None
    structured_outputs: StructuredOutputsParams | None = None
    priority: int = Field(0, ge=INT64_MIN, le=INT64_MAX)
    request_id: str = Field(default_factory=random_id)
    session_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    routed_experts_prompt_start: int = Field(0, ge=0)
    return_token_offsets: bool | None = False
    mm_payload: Literal["tensors", "none"] = "tensors"
    return_mm_kwargs: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    vllm_xargs: ExtraArguments | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    thinking_token_budget: ThinkingTokenBudget = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """The checks that vLLM makes before those of the fields' types, in its order."""
        if not isinstance(data, dict):
            return data
        _check_prompts(data)
        check_stream_options(data)
        _check_logprobs(data)
        structured = data.get("structured_outputs")
        if structured is not None:
            if count_constraints(structured) > 1:
                raise parameter_error(
                    "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').",
                    "structured_outputs",
                )
            check_structural_tag(structured)
        check_response_format(data)
        check_cache_salt(data)
        return {**data, "max_tokens": cls.MAX_TOKENS} if data.get("max_tokens") is None else data

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n

    @property
    def asked_logprobs(self) -> int | None:
        """Number of likeliest tokens whose log probabilities are reported with each token; None: none are reported."""
        return self.logprobs

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """The same for the prompt. An echo shows them, too."""
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs

    @property
    def only_echo(self) -> bool:
        """Whether the answer is the prompt alone. The engine still generates one token."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    @property
    def output_limit_name(self) -> str:
        return "max_tokens"


def _check_prompts(data: dict[str, Any]) -> None:
    prompt, embeds = data.get("prompt"), data.get("prompt_embeds")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        _check_number("prompt", prompt)
    if isinstance(embeds, list):
        _check_number("prompt_embeds", embeds)
    if prompt in (None, "") and embeds in (None, []):
        raise parameter_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def _check_number(name: str, entries: list[Any]) -> None:
    if len(entries) > MAX_COMPLETION_PROMPTS:
        raise parameter_error(
            f"{name} list length {len(entries)} exceeds the maximum allowed count of {MAX_COMPLETION_PROMPTS}. To "
            "increase this limit, set the VLLM_MAX_COMPLETION_PROMPTS environment variable.",
            name,
        )


def _check_logprobs(data: dict[str, Any]) -> None:
    if data.get("logprob_token_ids"):
        if data.get("use_beam_search"):
            raise parameter_error("`logprob_token_ids` is not supported with beam search.", "logprob_token_ids")
        if data.get("echo") and data.get("max_tokens") == 0:
            raise parameter_error(
                "`logprob_token_ids` is not supported when `echo=True` and `max_tokens=0` because no output tokens are "
                "generated.",
                "logprob_token_ids",
            )
        if data.get("logprobs") is None:
            raise parameter_error("when using `logprob_token_ids`, `logprobs` must be set.", "logprob_token_ids")
    if data.get("use_beam_search") and data.get("echo") and data.get("logprobs") is not None:
        raise parameter_error(
            "`echo` with `logprobs` is not supported with beam search because beam search does not compute prompt "
            "logprobs.",
            "echo",
        )
    check_prompt_logprobs(data, "logprobs")
    if data.get("logprobs") is not None:
        check_count("logprobs", data["logprobs"])
