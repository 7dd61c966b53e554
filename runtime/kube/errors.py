"""What can go wrong with an API server, as one typed error."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class NoClusterError(RuntimeError):
    """There is no way to an API server; the message says what to do."""


class ApiFailureCause(StrEnum):
    """Why a request or a watch failed. Label `cause` of `kvcluster_router_discovery_failures_total`."""

    CONNECT = "connect"
    """The API server could not be reached, or did not answer in time."""
    UNAUTHORIZED = "unauthorized"
    """401: the credentials are not accepted (expired, or of another cluster), or they cannot be read."""
    FORBIDDEN = "forbidden"
    """403: the account may not do this here."""
    THROTTLED = "throttled"
    """429: asked to come back later."""
    SERVER = "server_error"
    """Any 5xx."""
    STATUS = "status"
    """Any other status."""
    CUT = "cut"
    """The watch broke off, or ended at once."""
    SILENT = "silent"
    """The watch brought nothing, not even its end, for longer than the server lets one last."""
    ERROR_EVENT = "error_event"
    """The watch brought an ERROR event other than 410."""
    MALFORMED = "malformed"
    """What came is not what the API promises."""
    UNEXPECTED = "unexpected"
    """A defect of our own."""
    EXPIRED = "expired"
    """410, as a status or as an event: the position is no longer kept. No failure: the list is read again at once."""


_BY_STATUS = {
    0: ApiFailureCause.CONNECT,
    401: ApiFailureCause.UNAUTHORIZED,
    403: ApiFailureCause.FORBIDDEN,
    410: ApiFailureCause.EXPIRED,
    429: ApiFailureCause.THROTTLED,
}
_SAYS_WHEN = frozenset({ApiFailureCause.THROTTLED, ApiFailureCause.SERVER})
_ILL_TYPED = "failed to create typed patch object"
"""A manifest that does not fit its kind's schema is an error of the server's own to server-side apply."""


class KubeApiError(Exception):
    """A request to the API server, or a watch, failed.

    `status` is that of HTTP, 0 where there was no answer; `reason` and `message` are those of the answer's Status
    object (`message` is ours where there is none); `retry_after` are the seconds that the API server asks to wait for.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        retry_after: float | None = None,
        *,
        cause: ApiFailureCause | None = None,
    ) -> None:
        super().__init__(f"{status} {reason}".strip() + f": {message}" if status else message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        if cause is None:
            cause = _BY_STATUS.get(status, ApiFailureCause.SERVER if status >= 500 else ApiFailureCause.STATUS)
        self.cause = cause

    @classmethod
    def of(cls, cause: ApiFailureCause, message: str) -> KubeApiError:
        """A failure without an answer, or after it."""
        return cls(0, cause.name.capitalize(), message, cause=cause)

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later though nothing was changed."""
        return self.status in (0, 409, 429) or (self.status >= 500 and not self.message.startswith(_ILL_TYPED))

    @property
    def lasting(self) -> bool:
        """Whether a person should know though it may pass: something that the server asks in its turn fails, such as a
        webhook."""
        return self.status == 500 or not self.passing


def status_error(code: int, retry_after: str, status: object) -> KubeApiError:
    """What an answer without success means. `retry_after` is its header, `status` the Status object in its body, or
    whatever is there instead."""
    said = status if isinstance(status, Mapping) else {}
    text = status.decode(errors="replace").strip() if isinstance(status, bytes) else ""
    message = str(said.get("message") or text or "no reason is given")[:500]
    error = KubeApiError(code, str(said.get("reason") or ""), message)
    if error.cause in _SAYS_WHEN:
        details = said.get("details")
        seconds = details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
        if retry_after.isdecimal():
            seconds = int(retry_after)
        error.retry_after = float(seconds) if isinstance(seconds, int) and seconds > 0 else None
    return error


def error_event(status: Mapping[str, object]) -> KubeApiError:
    """What the object of an ERROR event means."""
    code = status.get("code")
    error = status_error(code if isinstance(code, int) and code > 0 else 500, "", status)
    if error.cause is not ApiFailureCause.EXPIRED:
        error.cause = ApiFailureCause.ERROR_EVENT
    return error
