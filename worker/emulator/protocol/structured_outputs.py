"""Constraints on the output: `structured_outputs` and `response_format`, and their checks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kvcache.errors import ApiError, parameter_error
from worker.emulator.protocol.base import UnionMember, WireModel


@dataclass
class StructuredOutputsParams:
    """A constraint on the output, of exactly one kind. (The class name appears in error messages.)"""

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
    """The constraint of a request: its `response_format` in addition to its `structured_outputs`. Raises `ApiError`."""
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


def check_response_format(data: Mapping[str, Any]) -> None:
    """Raises `ApiError` for an incomplete format."""
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


def count_constraints(structured: Any) -> int:
    """How many of the kinds that exclude one another are given. Raises what vLLM's own check raises."""
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


MAX_SCHEMA_NESTING = 64


def check_structured(structured: StructuredOutputsParams) -> None:
    """Raises `ApiError` for a constraint that no backend of vLLM compiles, as far as can be known without one: a JSON
    schema that is no JSON, or a regular expression that Python's `re` refuses. A grammar only must not be empty."""
    if structured.choice is not None and not structured.choice:
        raise ApiError(400, "Choice '[]' cannot be an empty list")
    for name in ("grammar", "json", "structural_tag"):
        value = getattr(structured, name)
        if isinstance(value, str) and not value.strip():
            raise ApiError(400, f"structured_outputs.{name} cannot be an empty string")
    if isinstance(structured.json, str):
        try:
            schema: Any = json.loads(structured.json)
        except json.JSONDecodeError:
            raise ApiError(400, "Invalid JSON grammar specification.") from None
    else:
        schema = structured.json
    if (unknown := _unknown_type(schema)) is not None:
        raise ApiError(400, f"Grammar error: Invalid type: {unknown}")
    if _nests_deeper(schema, MAX_SCHEMA_NESTING):
        raise ApiError(
            400,
            f"The JSON schema is nested too deeply: objects and arrays may nest at most {MAX_SCHEMA_NESTING} levels",
        )
    if structured.json_object is False:
        raise ApiError(
            400,
            "structured_outputs.json_object must be True if set; omit structured_outputs to disable structured outputs",
        )
    if structured.regex is not None:
        if "\x00" in structured.regex:
            raise ApiError(400, "structured_outputs.regex must not contain a NUL character ('\\x00')")
        _check_regex(structured.regex)


_SCHEMA_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})


def _unknown_type(schema: Any) -> str | None:
    """A `type` that JSON schema does not have, in the schema or in those of its properties and items."""
    if not isinstance(schema, dict):
        return None
    kinds = schema.get("type", ())
    for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else ():
        if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
            return kind
    inner = schema.get("properties")
    parts = [*(inner.values() if isinstance(inner, dict) else ()), schema.get("items")]
    return next((unknown for part in parts if (unknown := _unknown_type(part)) is not None), None)


_REGEX_MESSAGES = {
    "missing ), unterminated subpattern": "unclosed group",
    "unbalanced parenthesis": "unopened group",
    "unterminated character set": "unclosed character class",
    "nothing to repeat": "repetition operator missing expression",
    "min repeat greater than max repeat": "invalid repetition count range, the start must be <= the end",
}
"""Python's message for an invalid expression, and that of the library that vLLM uses."""


def _check_regex(regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        message = _REGEX_MESSAGES.get(error.msg, error.msg)
        mark = " " * (error.pos or 0) + "^"
        raise ApiError(
            400,
            f'Grammar error: at 1(8): invalid regex "{regex}" (in regex): regex parse error:\n    {regex}\n    {mark}\n'
            f"error: {message}\n   1 | start: /{regex}/\n              ^",
        ) from None


def _nests_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays nest more than `levels` deep."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
