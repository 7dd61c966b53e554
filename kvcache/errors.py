"""Errors of the HTTP API, in the words and the shape of vLLM 0.32 (an OpenAI error object).

Tests compare the bodies with captures of a running vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SSE_DONE = b"data: [DONE]\n\n"

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error. `type` defaults to vLLM's name for the status, `code` to the status.

    It is no `ValueError`, so that pydantic lets it through when a validator raises it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,  # noqa: A002
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _TYPES.get(status, "BadRequestError")

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return error_body(self.message, self.type, self.param, self.code or self.status)


class MessagesError(ApiError):
    """An error in the format of Anthropic's API, which vLLM uses once it has validated the request. `type` is given
    where Anthropic's name for the error is another."""

    def __init__(self, error: ApiError, *, type: str | None = None) -> None:  # noqa: A002
        super().__init__(error.status, error.message, type=type or error.type)

    def body(self) -> dict[str, Any]:
        return {"type": "error", "error": {"type": self.type, "message": super().body()["error"]["message"]}}


def error_body(message: str, type: str, param: str | None, code: int | str) -> dict[str, Any]:  # noqa: A002
    """`{"error": {message, type, param, code}}`; `code` repeats the HTTP status, unless it is a name.

    Half surrogate pairs, which a message may quote from a request, are escaped: no encoder takes them.
    """
    printable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": printable, "type": type, "param": param, "code": code}}


def sse_error(body: Mapping[str, Any]) -> bytes:
    """An error inside a stream that has begun: one event. `SSE_DONE` follows it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def messages_error(message: str) -> bytes:
    """The same inside a stream of Anthropic's Messages API: one event, and the end."""
    body = {"type": "error", "error": {"type": "internal_error", "message": message}}
    return b"event: error\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def parameter_error(message: str, parameter: str, value: object = None) -> ApiError:
    """A parameter out of range, as vLLM says it: the message, then the parameter and (unless None) its value."""
    detail = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return ApiError(400, f"{message} ({detail})", param=parameter)


def model_not_found(model: str, served: Sequence[str]) -> ApiError:
    """The request names a model that is not served here."""
    return ApiError(404, f"The model `{model}` does not exist. Valid aliases: {', '.join(served)}.", param="model")


def engine_dead() -> ApiError:
    """The engine died while the request ran; also the error event of a stream that it leaves behind."""
    return ApiError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
