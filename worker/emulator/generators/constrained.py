"""Text that satisfies a request's `structured_outputs` or `response_format`.

Compared with vLLM: which constraints are accepted, and that the text satisfies them. Not modelled: the model's choice
among all such texts. Of a list of choices one is drawn, and JSON is the smallest value that its schema allows. Regular
expressions, grammars and structural tags are accepted, but constrain nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from kvcache.tokens.tokenizer import Tokenizer
from worker.emulator.protocol.structured_outputs import StructuredOutputsParams

_SCALARS: Mapping[str, Any] = {"string": "", "boolean": False, "null": None}
_DEPTH = 64
"""Depth at which references that lead back to themselves end."""


def constrained_tokens(
    structured: StructuredOutputsParams | None, tokenizer: Tokenizer, seed: object
) -> list[int] | None:
    """The token ids of a text that satisfies the constraint, or None if any text does. `seed` selects among choices."""
    text = None if structured is None else _text(structured, random.Random(repr(seed)))
    return None if text is None else tokenizer.encode(text, add_special_tokens=False)


def _text(structured: StructuredOutputsParams, rng: random.Random) -> str | None:
    if structured.choice:
        return rng.choice(structured.choice)
    if structured.json_object:
        return "{}"
    if structured.json is None:
        return None
    schema = json.loads(structured.json) if isinstance(structured.json, str) else structured.json
    return json.dumps(smallest(schema, schema), ensure_ascii=False)


def smallest(schema: Any, root: Any, depth: int = 0) -> Any:
    """A small value that a JSON schema allows: required properties only, and the first of several alternatives."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return {}
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(reference := schema.get("$ref"), str):
        return smallest(_resolve(reference, root), root, depth + 1)
    for name in ("anyOf", "oneOf"):
        if schema.get(name):
            return smallest(schema[name][0], root, depth + 1)
    if schema.get("allOf"):
        merged = {key: value for part in schema["allOf"] for key, value in part.items()}
        return smallest(merged, root, depth + 1)
    return _by_type(schema, root, depth)


def _by_type(schema: Mapping[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        required = schema.get("required") or ()
        return {name: smallest(properties.get(name, {}), root, depth + 1) for name in required}
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * schema.get("minItems", 0)
        return [smallest(item, root, depth + 1) for item in items]
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        return min(least, schema["maximum"]) if "maximum" in schema else least
    if kind == "string":
        return "x" * schema.get("minLength", 0)
    return _SCALARS.get(kind)


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
