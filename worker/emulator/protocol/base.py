"""What the wire models have in common: bounds and checks that several requests share."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
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
    """16 hexadecimal digits: what ids end with."""
    return secrets.token_hex(8)


class WireModel(BaseModel):
    """A wire model: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class DeferredModel(WireModel):
    """A wire model that most workers never read: its validator is built when the first such request comes."""

    model_config = ConfigDict(defer_build=True)


class UnionMember(WireModel):
    """A wire model that is one branch of a union: its name stays out of the errors' locations."""

    @model_validator(mode="wrap")
    @classmethod
    def _unnamed(cls, data: Any, handler: ModelWrapValidatorHandler[UnionMember]) -> UnionMember:
        return handler(data)


class StreamOptions(WireModel):
    """What a stream reports beside its text."""

    include_usage: bool | None = False
    """Send one more chunk, with the usage, at the end."""
    continuous_usage_stats: bool | None = False
    """Send the usage so far with every chunk."""


def thinking_token_budget(value: Any) -> int | None:
    """A budget of thinking tokens, None for none or -1. Raises `ApiError`."""
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
    """Bounds of the search for repeated output; the emulated engine never repeats itself, hence never ends by it."""

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


@dataclass
class StructuredOutputsParams:
    """What the output must look like: exactly one kind of constraint. (The name shows in error messages.)"""

    json: str | dict[Any, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag)
        given = sum(kind is not None for kind in kinds)
        if given == 1:
            return
        what = "You can only use one kind of" if given else "You must use one kind of"
        found = "multiple are specified" if given else "none are specified"
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state |= {"_backend": None, "_backend_was_auto": False}
        raise ApiError(400, f"{what} structured outputs constraint but {found}: {state}")


class JsonSchemaFormat(WireModel):
    """The schema of `response_format`."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(UnionMember):
    """`response_format` of OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuralTag(WireModel):
    begin: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    end: str


class StructuralTagResponseFormat(UnionMember):
    type: Literal["structural_tag"]
    format: Any


class LegacyStructuralTagResponseFormat(UnionMember):
    type: Literal["structural_tag"]
    structures: list[StructuralTag]
    triggers: list[str]


AnyResponseFormat = ResponseFormat | StructuralTagResponseFormat | LegacyStructuralTagResponseFormat
_TAG_FORMAT: TypeAdapter[Any] = TypeAdapter(
    LegacyStructuralTagResponseFormat | StructuralTagResponseFormat, config=ConfigDict(defer_build=True)
)


def structured_outputs_of(
    structured: StructuredOutputsParams | None, response_format: AnyResponseFormat | None
) -> StructuredOutputsParams | None:
    """The constraint of a request: its `response_format` on top of its `structured_outputs`. Raises `ApiError`."""
    if response_format is None or response_format.type == "text":
        return structured
    given: dict[str, Any] = {} if structured is None else asdict(structured)
    if isinstance(response_format, ResponseFormat):
        if response_format.type == "json_object":
            given["json_object"] = True
        else:
            schema = response_format.json_schema
            given["json"] = None if schema is None else schema.schema_
    else:
        given["structural_tag"] = json.dumps(response_format.model_dump(by_alias=True))
    return StructuredOutputsParams(**given)


def check_cache_salt(data: Mapping[str, Any]) -> None:
    """Raises `ApiError` for a `cache_salt` that no cache backend takes."""
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
    """Raises `ApiError` for options of a stream where there is none."""
    if data.get("stream_options") and not data.get("stream"):
        raise parameter_error("Stream options can only be defined when `stream=True`.", "stream_options")


def check_response_format(data: Mapping[str, Any]) -> None:
    """Raises `ApiError` for a format that says too little."""
    given = data.get("response_format")
    if not isinstance(given, dict):
        return
    kind = given.get("type")
    if kind == "json_schema" and given.get("json_schema") is None:
        raise parameter_error(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.", "response_format"
        )
    if kind == "structural_tag":
        try:
            _TAG_FORMAT.validate_python(given)
        except ValidationError:
            raise parameter_error("Invalid response_format structural_tag specification.", "response_format") from None


def constraints(structured: Any) -> int:
    """How many of the kinds that exclude each other `structured_outputs` names. Fails as vLLM's own check does."""
    return sum(structured.get(kind) is not None for kind in ("json", "regex", "choice"))


def check_structural_tag(structured: Any) -> None:
    """Raises `ApiError` for a structural tag that is no JSON object."""
    tag = structured.get("structural_tag") if isinstance(structured, dict) else None
    if tag is None:
        return
    try:
        fits = isinstance(tag, str) and isinstance(json.loads(tag), dict)
    except ValueError:
        fits = False
    if not fits:
        raise parameter_error("Invalid structured_outputs structural_tag specification.", "structured_outputs")


def check_prompt_logprobs(data: Mapping[str, Any], other: str) -> None:
    """Raises `ApiError` for a `prompt_logprobs` out of range, or for it and the field `other` being no numbers."""
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
    """Raises `ApiError` for a number of log probabilities below 0 that is not -1."""
    if value < 0 and value != -1:
        raise parameter_error(f"`{name}` must be a positive value or -1.", name, value)
