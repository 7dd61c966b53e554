"""What several wire models share: base classes, bounds and checks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)
from pydantic.dataclasses import dataclass

from kvcache.errors import ApiError, parameter_error

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

MAX_STOP_STRINGS = 4
"""vLLM's VLLM_MAX_STOP_STRINGS."""

MAX_COMPLETION_PROMPTS = 1024
"""vLLM's VLLM_MAX_COMPLETION_PROMPTS."""

Stop = str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None
Seed = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None
TopLogprobs = Annotated[int, BeforeValidator(lambda value: 0 if value is None else value)]
ExtraArguments = dict[str, str | int | float | list[str | int | float]]

_SALT_FORBIDDEN = frozenset("@/\\\x00")
_SALT_LENGTH = 128


def random_id() -> str:
    """16 random hexadecimal digits, with which ids end."""
    return secrets.token_hex(8)


class WireModel(BaseModel):
    """A wire model. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class DeferredModel(WireModel):
    """A wire model whose validator is built at the first such request, because most workers never get one."""

    model_config = ConfigDict(defer_build=True)


class UnionMember(WireModel):
    """A wire model that is a member of a union. Its name does not appear in the location of errors."""

    @model_validator(mode="wrap")
    @classmethod
    def _unnamed(cls, data: Any, handler: ModelWrapValidatorHandler[UnionMember]) -> UnionMember:
        return handler(data)


class StreamOptions(WireModel):
    """What a stream reports in addition to its text."""

    include_usage: bool | None = False
    """Send one more chunk, with the usage, at the end."""
    continuous_usage_stats: bool | None = False
    """Send the usage so far with every chunk."""


def thinking_token_budget(value: Any) -> int | None:
    """The budget of thinking tokens; None if none is given, or -1. Raises `ApiError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise parameter_error(
            "`thinking_token_budget` must be a non-negative integer or -1 for unlimited.",
            "thinking_token_budget",
            value,
        )
    return None if value == -1 else value


ThinkingTokenBudget = Annotated[int | None, BeforeValidator(thinking_token_budget)]


@dataclass
class RepetitionDetectionParams:
    """Bounds of vLLM's detection of repeated output. The emulated engine checks them and ends no answer by it."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        if self.max_pattern_size < 0 or self.min_pattern_size < 0 or self.min_pattern_size > self.max_pattern_size:
            raise ApiError(
                400,
                "max_pattern_size, min_pattern_size must be >=0, with min_pattern_size <= max_pattern_size. "
                "Set both to 0 to disable repetitive pattern detection.",
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise ApiError(
                400,
                "min_count must be >= 2 to detect repetitive patterns in engine output. If you do not wish to detect "
                "repetitive patterns, set max_pattern_size to 0.",
            )


def check_cache_salt(data: Mapping[str, Any]) -> None:
    """Raises `ApiError` for an invalid `cache_salt`."""
    salt = data.get("cache_salt")
    if salt is None:
        return
    if not isinstance(salt, str) or not salt:
        raise parameter_error("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    if len(salt) > _SALT_LENGTH or not _SALT_FORBIDDEN.isdisjoint(salt):
        raise parameter_error(
            "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\\\', or NUL.",
            "cache_salt",
        )


def check_stream_options(data: Mapping[str, Any]) -> None:
    """Raises `ApiError` for stream options without a stream."""
    if data.get("stream_options") and not data.get("stream"):
        raise parameter_error("Stream options can only be defined when `stream=True`.", "stream_options")


def check_prompt_logprobs(data: Mapping[str, Any], other: str) -> None:
    """Raises `ApiError` if `prompt_logprobs` is out of range, or it or the field `other` is no number."""
    for name in ("prompt_logprobs", other):
        value = data.get(name)
        if value is not None and not isinstance(value, int | float):
            raise parameter_error(f"`{name}` must be an integer.", name, value)
    asked = data.get("prompt_logprobs")
    if asked is None:
        return
    if data.get("stream") and (asked > 0 or asked == -1):
        raise parameter_error("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    check_count("prompt_logprobs", asked)


def check_count(name: str, value: float) -> None:
    """Raises `ApiError` for a negative number of log probabilities other than -1."""
    if value < 0 and value != -1:
        raise parameter_error(f"`{name}` must be a positive value or -1.", name, value)
