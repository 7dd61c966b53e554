"""From the bytes of a body to a request."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from kvcache.errors import ApiError
from worker.emulator.protocol.errors import InternalError, unparsable, validation_failed

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
