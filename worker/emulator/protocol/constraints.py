"""Constraints on output that no backend of vLLM would compile."""

from __future__ import annotations

import json
import re
from typing import Any

from kvcache.errors import ApiError
from worker.emulator.protocol.base import StructuredOutputsParams

MAX_SCHEMA_NESTING = 64


def check_structured(structured: StructuredOutputsParams) -> None:
    """Raises `ApiError` for a constraint that no backend of vLLM compiles, as far as that shows without one: a JSON
    schema that is no JSON, an expression that Python's own `re` refuses. Grammars are only looked at for emptiness."""
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
    if _deeper(schema, MAX_SCHEMA_NESTING):
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
    """A `type` that JSON schemas have not, in the schema or in those of its properties and items."""
    if not isinstance(schema, dict):
        return None
    kinds = schema.get("type", ())
    for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else ():
        if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
            return kind
    inner = schema.get("properties")
    parts = [*(inner.values() if isinstance(inner, dict) else ()), schema.get("items")]
    return next((unknown for part in parts if (unknown := _unknown_type(part)) is not None), None)


_COMPLAINTS = {
    "missing ), unterminated subpattern": "unclosed group",
    "unbalanced parenthesis": "unopened group",
    "unterminated character set": "unclosed character class",
    "nothing to repeat": "repetition operator missing expression",
    "min repeat greater than max repeat": "invalid repetition count range, the start must be <= the end",
}
"""What Python says of an expression, in the words of the library that vLLM asks."""


def _check_regex(regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        complaint = _COMPLAINTS.get(error.msg, error.msg)
        mark = " " * (error.pos or 0) + "^"
        raise ApiError(
            400,
            f'Grammar error: at 1(8): invalid regex "{regex}" (in regex): regex parse error:\n    {regex}\n    {mark}\n'
            f"error: {complaint}\n   1 | start: /{regex}/\n              ^",
        ) from None


def _deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays nest in more than so many levels."""
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
