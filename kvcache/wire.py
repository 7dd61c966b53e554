"""Requests of the OpenAI API as vLLM takes them.

Unknown fields are ignored, as vLLM does. Limits that depend on the model (its name, its context) are the server's
to check, with the errors of `kvcache.errors`.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kvcache.errors import (
    SSE_DONE,
    ApiError,
    error_body,
    parameter_error,
    sse_error,
    unparsable,
    validation_failed,
)
from kvcache.wire_messages import ChatMessage

__all__ = [
    "SSE_DONE",
    "ApiError",
    "ChatCompletionRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "StreamOptions",
    "TokenizeRequest",
    "error_body",
    "parse_json",
    "parse_request",
    "sse_error",
]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(_Wire):
    """What a stream reports beside its text."""

    include_usage: bool | None = True
    """Send one more chunk, with the usage, at the end. vLLM's own default, hence ours, differs from OpenAI's."""
    continuous_usage_stats: bool | None = False
    """Send the usage so far with every chunk."""


class _Generation(_Wire):
    """What completion and chat requests have in common: which model, how to sample, when to stop."""

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    echo: bool | None = False
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    user: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise parameter_error(
                f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens", self.max_tokens
            )
        if self.min_tokens < 0:
            raise parameter_error(
                f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.", "min_tokens", self.min_tokens
            )
        if self.n < 1:
            raise parameter_error(f"n must be at least 1, got {self.n}.", "n", self.n)
        if self.temperature is not None and self.temperature < 0:
            raise parameter_error(
                f"temperature must be non-negative, got {self.temperature}.", "temperature", self.temperature
            )
        if self.stream_options is not None and not self.stream:
            raise parameter_error("Stream options can only be defined when `stream=True`.", "stream_options")
        if self.cache_salt == "":
            raise parameter_error("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list; empty strings stop nothing."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )


class CompletionRequest(_Generation):
    """Body of POST /v1/completions."""

    prompt: list[int] | list[list[int]] | str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class ChatCompletionRequest(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    add_generation_prompt: bool = True
    response_format: dict[str, Any] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        limit = self.max_completion_tokens
        if limit is not None and limit < 1:
            raise parameter_error(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
        return self

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens`, else its older name `max_tokens`; None = as many as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TokenizeRequest(_Wire):
    """Body of POST /tokenize: text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise validation_failed(
                [{"type": "missing", "loc": ("prompt",), "msg": "Field required", "input": self.model_dump()}]
            )
        return self


class DetokenizeRequest(_Wire):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


_Request = TypeVar("_Request", bound=BaseModel)


def parse_request(model: type[_Request], raw: bytes) -> _Request:
    """A request from its body's bytes. Raises `ApiError`, ready to be answered."""
    if not raw:
        raise validation_failed([{"type": "missing", "loc": (), "msg": "Field required", "input": None}])
    try:
        return model.model_validate(parse_json(raw), from_attributes=True)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False)) from None


def parse_json(raw: bytes) -> Any:
    """JSON of a request's body. Raises `ApiError` in vLLM's words, with the position of the fault.

    Numbers that are no JSON (NaN) and half surrogate pairs pass, as they do in vLLM.
    """
    try:
        return from_json(raw)
    except ValueError:
        pass  # the slower parser knows the position in vLLM's words, or accepts what this one does not
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": (error.pos,), "msg": "JSON decode error", "input": {}}
        raise validation_failed([detail | {"ctx": {"error": error.msg}}]) from None
    except (ValueError, RecursionError):
        raise unparsable() from None
