"""The failures an API server answers with, as `Status` objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
    406: "NotAcceptable", 409: "Conflict", 410: "Expired", 415: "UnsupportedMediaType", 422: "Invalid",
    429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip


class ApiError(Exception):
    """An answer other than success; `headers` go with it. Its reason follows from the code, unless None is given."""

    def __init__(
        self, code: int, message: str, reason: str | None = "", details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = REASONS.get(code, "Unknown") if reason == "" else reason
        self.details = details
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        }  # fmt: skip
        if self.reason is None:
            del status["reason"]
        if self.details:
            status["details"] = self.details
        return status


PAGE = "docs/decisions/020-the-test-bed-models-what-tests-ask-for.md"


def not_modelled(what: str) -> ApiError:
    """501 for what a real API server does and this one does not: no test may come to depend on it unseen."""
    return ApiError(501, f"not modelled by the test bed: {what} ({PAGE})", "NotImplemented")


@dataclass(frozen=True)
class Cause:
    """One fault of one field; `reason` is the machine's word for it, `message` what follows the field's name."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"

    def text(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


def unmodelled(field: str, what: str) -> Cause:
    """The fault of an object that asks for what is not modelled."""
    return Cause(field, f"Forbidden: not modelled by the test bed: {what} ({PAGE})", "FieldValueForbidden")


def resource_name(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def _details(group: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    details = {"name": name, "group": group, "kind": kind, **more}
    return {key: value for key, value in details.items() if value}


def not_found(group: str, plural: str, name: str) -> ApiError:
    message = f'{resource_name(group, plural)} "{name}" not found'
    return ApiError(404, message, details=_details(group, plural, name))


def no_such_path() -> ApiError:
    return ApiError(404, "the server could not find the requested resource", details={})


def already_exists(group: str, plural: str, name: str) -> ApiError:
    message = f'{resource_name(group, plural)} "{name}" already exists'
    return ApiError(409, message, "AlreadyExists", _details(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str = "") -> ApiError:
    why = why or ("the object has been modified; please apply your changes to the latest version and try again")
    message = f'Operation cannot be fulfilled on {resource_name(group, plural)} "{name}": {why}'
    return ApiError(409, message, details=_details(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: Iterable[Cause]) -> ApiError:
    """422 for an object whose fields are at fault; repeated faults are named once."""
    unique = list(dict.fromkeys(causes))
    texts = list(dict.fromkeys(cause.text() for cause in unique))
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    message = f'{resource_name(group, kind)} "{name}" is invalid: {listed}'
    listed_causes = [{"reason": c.reason, "message": c.message, "field": c.field} for c in unique]
    return ApiError(422, message, details=_details(group, kind, name, causes=listed_causes))


def bad_request(message: str) -> ApiError:
    return ApiError(400, message)


def gone(message: str) -> ApiError:
    return ApiError(410, message, "Expired")


def method_not_allowed() -> ApiError:
    return ApiError(405, "the server does not allow this method on the requested resource", details={})
