"""Validates bodies: from bytes to a request, with vLLM 0.32's messages for what does not fit its model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from kvcache.errors import ApiError

_SHOWN = 10
"""The number of errors that a message lists at most."""
_INPUT_CHARS = 200
"""The characters of a value that it quotes at most."""
_DETAIL_CHARS = 1000
"""The characters that it writes about one error at most."""

_BRACKETS = re.compile(r"[\[\]{}()]")
_INTERNAL = frozenset(
    {
        "function-wrap", "function-after", "function-before", "function-plain", "json-or-python", "lax-or-strict",
        "chain", "default", "nullable", "tagged-union", "union", "call", "arguments", "is-instance", "is-subclass",
        "callable", "str", "int", "float", "bool", "bytes", "bytearray", "list", "tuple", "dict", "set", "frozenset",
        "complex", "none", "nonetype",
    }
)  # fmt: skip
"""pydantic's names for members of unions and for wrappers, which vLLM leaves out of `loc` and `param`."""


class DetailError(ApiError):
    """An error that vLLM leaves to FastAPI. Its body is `{"detail": ...}` instead of an error object."""

    def body(self) -> dict[str, Any]:
        return {"detail": self.message}


class InternalError(ApiError):
    """vLLM fails on such a request, because its code expects another type."""

    def __init__(self, message: str) -> None:
        super().__init__(500, sanitized(message))


def unparsable() -> ApiError:
    """The body is no JSON for a reason without a position: its encoding, or too deep nesting."""
    return DetailError(400, "There was an error parsing the body")


def unsupported_media_type() -> ApiError:
    """The content type is not JSON."""
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    return ApiError(400, message, type="Bad Request")


def validation_failed(errors: Sequence[Mapping[str, Any]], part: str = "body") -> ApiError:
    """The error for a request that does not fit its model. `errors`: pydantic's, with `loc` from the root of that part
    of the request."""
    shown = "".join(f"\n  {_detail(entry, part)}" for entry in errors[:_SHOWN])
    plural = "" if len(errors) == 1 else "s"
    more = f"\n  ...and {len(errors) - _SHOWN} more errors" if len(errors) > _SHOWN else ""
    message = f"{len(errors)} validation error{plural}:{shown}{more}"
    return ApiError(400, sanitized(message), param=_location(errors[0]["loc"], part), type="Bad Request")


def sanitized(message: str) -> str:
    """The message without memory addresses, tracebacks and file paths."""
    for pattern, replacement in _LEAKS:
        message = pattern.sub(replacement, message)
    return message.strip()


_LEAKS = (
    (re.compile(r" at 0x[0-9a-fA-F]+>"), ">"),
    (re.compile(r'\n?\s*File "[^"]+", line \d+, in \S+(\n\s+.*)?'), ""),
    (re.compile(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+"), "<path>"),
    (re.compile(r"(?:/[\w\-]+)+/[\w\-]+\.\w+"), "<path>"),
)


def _location(loc: Sequence[object], part: str) -> str:
    parts = [part, *map(str, loc)]
    return ".".join(name for name in parts if not (_BRACKETS.search(name) or name.lower() in _INTERNAL))


def _detail(entry: Mapping[str, Any], part: str) -> str:
    detail = {
        "type": entry["type"],
        "loc": _location(entry["loc"], part),
        "msg": entry["msg"],
        "input": _summary(entry["input"]),
    }
    if "ctx" in entry:
        detail["ctx"] = entry["ctx"]
    text = str(detail)
    return text if len(text) <= _DETAIL_CHARS else text[:_DETAIL_CHARS] + "...[truncated]"


def _summary(value: object) -> str:
    """A value for an error message: a container by its size only, text up to a length, so that no body is echoed."""
    if isinstance(value, dict | list):
        return f"<{type(value).__name__} of {len(value)} items>"
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # an integer with more digits than Python converts
        return f"<{type(value).__name__}>"
    return text if len(text) <= _INPUT_CHARS else text[:_INPUT_CHARS] + "...[truncated]"


_Request = TypeVar("_Request", bound=BaseModel)


def parse_request(model: type[_Request] | TypeAdapter[_Request], raw: bytes) -> _Request:
    """The request in a body. Raises `ApiError`."""
    return validated(model, parse_body(raw))


def parse_body(raw: bytes) -> Any:
    """The JSON of a body that must not be missing. Raises `ApiError`."""
    value = parse_json(raw) if raw else None
    if value is None:
        raise validation_failed([{"type": "missing", "loc": (), "msg": "Field required", "input": None}])
    return value


def validated_query(model: type[_Request], query: str) -> _Request:
    """The parameters of a query string, of each the last. Raises `ApiError`."""
    given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False), "query") from None


def validated(model: type[_Request] | TypeAdapter[_Request], value: Any) -> _Request:
    """The request in a JSON value. Raises `ApiError`.

    Python's own errors come from checks that use a value before its type is known. vLLM has the same checks, and
    answers with the same errors.
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
    """The JSON value of a body. Raises `ApiError` with vLLM's message, which has the position of the error.

    NaN and lone surrogates, which are no JSON, are accepted as in vLLM.
    """
    try:
        return from_json(raw)
    except ValueError:
        pass  # the slower parser gives the position as vLLM does, or accepts what this one refuses
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": (error.pos,), "msg": "JSON decode error", "input": {}}
        raise validation_failed([detail | {"ctx": {"error": error.msg}}]) from None
    except (ValueError, RecursionError):
        raise unparsable() from None
