"""API keys at the data port: who may send requests, on whose behalf, and how many."""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from starlette.types import Scope

from kvcache.errors import ApiError, MessagesError
from router.core.decision import BYTES_OF_A_TOKEN, Caller, RouteRequest
from router.core.latency_samples import Usage
from router.core.rates import MINUTE, Bucket, Exceeded, Limit, RateLimiter
from router.server.client_answer import Edit
from router.server.key_file import ApiKey, KeyFile, digest
from router.server.prompts import MESSAGES
from runtime.http.context import Headers

BEARER = b"bearer "
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
"""Headers that state a key: OpenAI's clients send the first, Anthropic's the second. No worker gets them."""
CLIENT_ERROR = 400
_ADMITTED, _REFUSED = "kvcluster.admitted", "kvcluster.refused"
"""What a screened request's scope holds: `Admitted`, or the error that refuses it."""


class Denial(StrEnum):
    """Why a request is answered with 401. Label `why` of `kvcluster_router_unauthorized_total`."""

    MISSING = "missing"
    UNKNOWN = "unknown"
    EXPIRED = "expired"


_MESSAGES = {
    Denial.MISSING: "No API key was given. Send it as `Authorization: Bearer KEY` (or as `x-api-key: KEY`).",
    Denial.UNKNOWN: "This API key is not valid here.",
    Denial.EXPIRED: "This API key has expired.",
}


class Unauthorized(ApiError):
    """A request without a key that is valid now (401), in the shape of OpenAI's API."""

    def __init__(self, why: Denial) -> None:
        code = "expired_api_key" if why is Denial.EXPIRED else "invalid_api_key"
        super().__init__(401, _MESSAGES[why], type="invalid_request_error", code=code)
        self.why = why
        self.headers: Headers = [(b"www-authenticate", b"Bearer")]

    def shaped(self, path: str) -> ApiError:
        """In the shape of the API that has this path."""
        return MessagesError(self, type="authentication_error") if path.startswith(MESSAGES) else self


class RateExceeded(ApiError):
    """A key has used up its rate (429), in the shape of OpenAI's API. Its headers say when to try again."""

    def __init__(self, exceeded: Exceeded) -> None:
        wait = exceeded.retry_after
        super().__init__(
            429,
            f"Rate limit of this API key reached: {exceeded.rate:.12g} {exceeded.limit.value} a minute."
            f" Try again in {duration(wait)}.",
            type=exceeded.limit.value,
            code="rate_limit_exceeded",
        )
        self.limit = exceeded.limit
        self.headers: Headers = [
            (b"retry-after", b"%d" % max(math.ceil(wait), 1)),
            (b"retry-after-ms", b"%d" % max(math.ceil(wait * 1000), 1)),
        ]

    def shaped(self, path: str) -> ApiError:
        """In the shape of the API that has this path."""
        return MessagesError(self, type="rate_limit_error") if path.startswith(MESSAGES) else self


@dataclass(slots=True)
class Admitted:
    """One request and the key that it was admitted with. What it used of the key's tokens is settled at its end."""

    key: ApiKey
    limiter: RateLimiter
    charged: int = 0
    """Tokens that were paid for when the request was read."""
    usage: Usage | None = None
    """What its answer states."""
    events: int = 0
    """Events of its stream from the first with content on. Each is taken for a token where no usage is stated."""

    def route(self, route: RouteRequest) -> RouteRequest:
        """The request with the key's tenant and priority, which are stronger than what its headers state."""
        stated = route.caller
        priority = stated.priority if self.key.priority is None else self.key.priority
        return replace(route, caller=Caller(self.key.tenant, priority, stated.objective))

    def charge(self, route: RouteRequest, size: int, now: float) -> None:
        """Pay for the prompt of a request that has been read; `size`: bytes of its body. Raises `RateExceeded`."""
        if self.limiter.tokens is None or not route.prompted:
            return
        tokens = route.prompt_tokens if route.prompt_tokens is not None else math.ceil(size / BYTES_OF_A_TOKEN)
        if (exceeded := self.limiter.charge(tokens, now)) is not None:
            raise RateExceeded(exceeded)
        self.charged = tokens

    def settle(self, status: int | None, now: float) -> None:
        """The request is over; `status`: that of its answer, None if the client left before it had the whole."""
        if self.usage is not None:
            used = self.usage.prompt + (self.usage.completion or 0)
        elif status is not None and status >= CLIENT_ERROR:
            used = 0
        else:
            used = self.charged + self.events
        self.limiter.settle(self.charged, used, now)

    def edit(self, clock: Callable[[], float]) -> Edit | None:
        """Adds OpenAI's headers about the rates of the key to an answer; None if it has none."""
        limiter = self.limiter
        if limiter.requests is None and limiter.tokens is None:
            return None

        def with_rates(headers: Headers) -> Headers:
            kept = [header for header in headers if not header[0].startswith(b"x-ratelimit-")]
            return kept + rate_headers(limiter, clock())

        return with_rates


@dataclass(slots=True)
class Gate:
    """Admits requests by the keys of a file. `clock` times the rates, `wall` (Unix time) the keys' ends."""

    file: KeyFile
    clock: Callable[[], float]
    wall: Callable[[], float]

    def screen(self, scope: Scope) -> bool:
        """Look at the key of a request whose headers are there, and note in its scope what `admitted` says of it.
        Returns whether it is admitted."""
        try:
            scope[_ADMITTED] = self.admit(scope["headers"])
        except (Unauthorized, RateExceeded) as error:
            scope[_REFUSED] = error
            return False
        return True

    def admitted(self, scope: Scope) -> Admitted:
        """The key of a request that has been screened. Raises `Unauthorized`, `RateExceeded`."""
        if (error := scope.get(_REFUSED)) is not None:
            raise error
        admitted: Admitted = scope[_ADMITTED]
        return admitted

    def admit(self, headers: Headers) -> Admitted:
        """The key that a request's headers state. Raises `Unauthorized`, `RateExceeded`."""
        stated = credential(headers)
        if not stated:
            raise Unauthorized(Denial.MISSING)
        sought = digest(stated)
        found = self.file.keys.get(sought)
        if found is None or not hmac.compare_digest(found[0].digest, sought):
            raise Unauthorized(Denial.UNKNOWN)
        key, limiter = found
        if key.expires is not None and self.wall() >= key.expires:
            raise Unauthorized(Denial.EXPIRED)
        now = self.clock()
        if (exceeded := limiter.arrive(now)) is not None:
            refusal = RateExceeded(exceeded)
            refusal.headers += rate_headers(limiter, now)
            raise refusal
        return Admitted(key, limiter)


def credential(headers: Headers) -> bytes:
    """The key that headers state, `Authorization: Bearer` before `x-api-key`; empty: none."""
    plain = b""
    for name, value in headers:
        lower = name.lower()
        if lower == b"authorization" and value[: len(BEARER)].lower() == BEARER:
            return value[len(BEARER) :].strip()
        if lower == b"x-api-key" and not plain:
            plain = value.strip()
    return plain


def without_credentials(headers: Headers) -> Headers:
    """Headers (their names in lower case) for a worker, which has no use for the client's key."""
    return [header for header in headers if header[0] not in CREDENTIALS]


def rate_headers(limiter: RateLimiter, now: float) -> Headers:
    """OpenAI's headers about what a key may use, what is left, and when it will be full again."""
    headers: Headers = []
    for limit, bucket in ((Limit.REQUESTS, limiter.requests), (Limit.TOKENS, limiter.tokens)):
        if bucket is not None:
            headers += _bucket_headers(limit.value.encode(), bucket, now)
    return headers


def _bucket_headers(name: bytes, bucket: Bucket, now: float) -> Headers:
    level = bucket.level(now)
    return [
        (b"x-ratelimit-limit-" + name, b"%d" % bucket.capacity),
        (b"x-ratelimit-remaining-" + name, b"%d" % max(level, 0.0)),
        (b"x-ratelimit-reset-" + name, duration((bucket.capacity - level) * MINUTE / bucket.capacity).encode()),
    ]


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers state it, rounded up: `120ms`, `7s`, `6m0s`."""
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= MINUTE else f"{whole}s"
