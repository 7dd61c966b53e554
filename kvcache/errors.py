"""Errors of the HTTP API, in the words and the shape of vLLM 0.32 (an OpenAI error object).

Tests compare the bodies with captures of a running vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SSE_DONE = b"data: [DONE]\n\n"

_SHOWN = 10
"""A validation error's message lists at most so many."""

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error. `type` defaults to vLLM's name for the status.

    It is no `ValueError`, so that pydantic lets it through when a validator raises it.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, type: str | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = type or _TYPES.get(status, "BadRequestError")

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return error_body(self.message, self.type, self.param, self.status)


def error_body(message: str, type: str, param: str | None, code: int) -> dict[str, Any]:  # noqa: A002
    """`{"error": {message, type, param, code}}`; `code` repeats the HTTP status.

    Half surrogate pairs, which a message may quote from a request, are escaped: no encoder takes them.
    """
    printable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": printable, "type": type, "param": param, "code": code}}


def sse_error(body: Mapping[str, Any]) -> bytes:
    """An error inside a stream that has begun: one event. `SSE_DONE` follows it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def parameter_error(message: str, parameter: str, value: object = None) -> ApiError:
    """A parameter out of range, as vLLM says it: the message, then the parameter and (unless None) its value."""
    detail = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return ApiError(400, f"{message} ({detail})", param=parameter)


def model_not_found(model: str, served: Sequence[str]) -> ApiError:
    """The request names a model that is not served here."""
    return ApiError(404, f"The model `{model}` does not exist. Valid aliases: {', '.join(served)}.", param="model")


def prompt_too_long(prompt_tokens: int, max_model_len: int, *, at_least: bool) -> ApiError:
    """The prompt leaves no room for an answer. vLLM stops tokenising text one token past the limit, so for text it
    reports `at_least` that many."""
    counted = min(prompt_tokens, max_model_len + 1) if at_least else prompt_tokens
    return parameter_error(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
        f"{'at least ' if at_least else ''}{counted} input tokens, which exceeds this limit even without any output "
        "tokens. Please reduce the length of the input prompt.",
        "input_tokens",
        counted,
    )


def max_tokens_too_large(max_tokens: int, max_model_len: int) -> ApiError:
    """More output asked for than the model's context holds."""
    return parameter_error(
        f"max_tokens={max_tokens} cannot be greater than max_model_len={max_model_len}. Please request fewer output "
        "tokens.",
        "max_tokens",
        max_tokens,
    )


def output_too_long(prompt_tokens: int, max_tokens: int, max_model_len: int) -> ApiError:
    """Prompt and output each fit the context, but not together. No capture shows this one."""
    return parameter_error(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} output "
        f"tokens and your prompt contains {prompt_tokens} input tokens, for a total of {prompt_tokens + max_tokens} "
        f"tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
        "input_tokens",
        prompt_tokens,
    )


def engine_dead() -> ApiError:
    """The engine died while the request ran; also the error event of a stream that it leaves behind."""
    return ApiError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")


def unparsable() -> ApiError:
    """The body is no JSON for a reason that has no position: its encoding, or nesting without end."""
    return ApiError(400, "There was an error parsing the body", type="Bad Request")


def unsupported_media_type() -> ApiError:
    """The content type is not JSON."""
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    return ApiError(400, message, type="Bad Request")


def validation_failed(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A request that does not fit its model, from pydantic's error details (`loc` counts from the body's root)."""
    shown = "".join(f"\n  {_detail(entry)}" for entry in errors[:_SHOWN])
    more = f"\n  ...and {len(errors) - _SHOWN} more errors" if len(errors) > _SHOWN else ""
    plural = "" if len(errors) == 1 else "s"
    message = f"{len(errors)} validation error{plural}:{shown}{more}"
    return ApiError(400, message, param=_location(errors[0]), type="Bad Request")


def _location(entry: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in ("body", *entry["loc"]))


def _detail(entry: Mapping[str, Any]) -> dict[str, Any]:
    detail = {
        "type": entry["type"],
        "loc": _location(entry),
        "msg": entry["msg"],
        "input": _summary(entry["input"]),
    }
    if "ctx" in entry:
        detail["ctx"] = {name: _summary(value) for name, value in entry["ctx"].items()}
    return detail


def _summary(value: object) -> object:
    """A value in an error message: containers by their size only, text up to a length, so a body is never echoed."""
    match value:
        case dict() | list():
            return f"<{type(value).__name__} of {len(value)} items>"
        case str() if len(value) > 100:
            return value[:100] + "..."
        case str() | int() | float() | None:
            return value
        case _:
            return str(value)
