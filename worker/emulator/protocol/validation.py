"""From the bytes of a body to a request, and what vLLM 0.32 says of one that does not fit its model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from kvcache.errors import ApiError

_SHOWN = 10
"""A validation error's message lists at most so many,"""
_INPUT_CHARS = 200
"""quotes at most so much of a value,"""
_DETAIL_CHARS = 1000
"""and says at most so much of each."""

_BRACKETS = re.compile(r"[\[\]{}()]")
_INTERNAL = frozenset(
    {
        "function-wrap", "function-after", "function-before", "function-plain", "json-or-python", "lax-or-strict",
        "chain", "default", "nullable", "tagged-union", "union", "call", "arguments", "is-instance", "is-subclass",
        "callable", "str", "int", "float", "bool", "bytes", "bytearray", "list", "tuple", "dict", "set", "frozenset",
        "complex", "none", "nonetype",
    }
)  # fmt: skip
"""pydantic's names for branches of a union and wrappers: vLLM leaves them out of `loc` and `param`."""


class DetailError(ApiError):
    """An error that vLLM leaves to FastAPI, hence `{"detail": ...}` where others have an error object."""

    def body(self) -> dict[str, Any]:
        return {"detail": self.message}


class InternalError(ApiError):
    """vLLM stumbled over the request: its code expected another type."""

    def __init__(self, message: str) -> None:
        super().__init__(500, sanitized(message))


def unparsable() -> ApiError:
    """The body is no JSON for a reason that has no position: its encoding, or nesting without end."""
    return DetailError(400, "There was an error parsing the body")


def unsupported_media_type() -> ApiError:
    """The content type is not JSON."""
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    return ApiError(400, message, type="Bad Request")


def validation_failed(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A request that does not fit its model, from pydantic's error details (`loc` counts from the body's root)."""
    shown = "".join(f"\n  {_detail(entry)}" for entry in errors[:_SHOWN])
    plural = "" if len(errors) == 1 else "s"
    more = f"\n  ...and {len(errors) - _SHOWN} more errors" if len(errors) > _SHOWN else ""
    message = f"{len(errors)} validation error{plural}:{shown}{more}"
    return ApiError(400, sanitized(message), param=_location(errors[0]["loc"]), type="Bad Request")


def sanitized(message: str) -> str:
    """A message without addresses of memory, tracebacks and paths of files."""
    for pattern, replacement in _LEAKS:
        message = pattern.sub(replacement, message)
    return message.strip()


_LEAKS = (
    (re.compile(r" at 0x[0-9a-fA-F]+>"), ">"),
    (re.compile(r'\n?\s*File "[^"]+", line \d+, in \S+(\n\s+.*)?'), ""),
    (re.compile(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+"), "<path>"),
    (re.compile(r"(?:/[\w\-]+)+/[\w\-]+\.\w+"), "<path>"),
)


def _location(loc: Sequence[object]) -> str:
    parts = ["body", *map(str, loc)]
    return ".".join(part for part in parts if not (_BRACKETS.search(part) or part.lower() in _INTERNAL))


def _detail(entry: Mapping[str, Any]) -> str:
    detail = {
        "type": entry["type"],
        "loc": _location(entry["loc"]),
        "msg": entry["msg"],
        "input": _summary(entry["input"]),
    }
    if "ctx" in entry:
        detail["ctx"] = entry["ctx"]
    text = str(detail)
    return text if len(text) <= _DETAIL_CHARS else text[:_DETAIL_CHARS] + "...[truncated]"


def _summary(value: object) -> str:
    """A value in an error message: containers by their size only, text up to a length, so a body is never echoed."""
    if isinstance(value, dict | list):
        return f"<{type(value).__name__} of {len(value)} items>"
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # a number of more digits than Python writes out
        return f"<{type(value).__name__}>"
    return text if len(text) <= _INPUT_CHARS else text[:_INPUT_CHARS] + "...[truncated]"


_Request = TypeVar("_Request", bound=BaseModel)


def parse_request(model: type[_Request] | TypeAdapter[_Request], raw: bytes) -> _Request:
    """A request from its body's bytes. Raises `ApiError`, ready to be answered."""
    return validated(model, parse_body(raw))


def parse_body(raw: bytes) -> Any:
    """The JSON of a body that must be there. Raises `ApiError`."""
    value = parse_json(raw) if raw else None
    if value is None:
        raise validation_failed([{"type": "missing", "loc": (), "msg": "Field required", "input": None}])
    return value


def validated(model: type[_Request] | TypeAdapter[_Request], value: Any) -> _Request:
    """A request from its JSON. Raises `ApiError`.

    Python's own errors come from checks that look at a value before its type is known, as vLLM's do: there, too, they
    become the answer.
    """
    validate = model.validate_python if isinstance(model, TypeAdapter) else model.model_validate
    try:
        return validate(value, from_attributes=True)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False)) from None
    except (TypeError, OverflowError) as error:
        raise ApiError(400, str(error)) from None
    except (AttributeError, KeyError) as error:
        raise InternalError(str(error)) from None


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
