"""Cross-origin requests (Fetch standard, 3.2): the router answers preflights itself, whatever the workers allow."""

from __future__ import annotations

from dataclasses import dataclass

from router.server.client_answer import ClientAnswer, Edit
from router.server.headers import find
from runtime.http.context import Headers

ANY = "*"
_METHODS = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_MAX_AGE = b"600"
_PLAIN = (b"content-type", b"text/plain; charset=utf-8")
_PREFLIGHT_VARIES = (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a request asks on a browser's behalf what another may send. It never has credentials."""
    return (
        method == "OPTIONS" and bool(find(headers, b"origin")) and bool(find(headers, b"access-control-request-method"))
    )


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins whose pages may use the data port from a browser; `ANY` among them means all. If there are none, the
    router adds no headers and passes preflights on.

    Credentials in the sense of browsers (cookies) are not allowed: API keys are sent in `Authorization`, by scripts.
    """

    origins: frozenset[str] = frozenset()

    def is_preflight(self, method: str, headers: Headers) -> bool:
        """Whether a request is a preflight that the router answers; without any origins, the worker does."""
        return bool(self.origins) and is_preflight(method, headers)

    def headers(self, request: Headers) -> Headers:
        """The headers to add to the answer to a request with these headers."""
        origin = find(request, b"origin") if self.origins else b""
        if not origin or not self._allows(origin):
            return []
        if ANY in self.origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"*"),
            (b"vary", b"Origin"),
        ]

    def answer_preflight(self, headers: Headers, to: ClientAnswer) -> int:
        """Answer a preflight as vLLM's server (Starlette) does. Returns the status."""
        origin = find(headers, b"origin")
        allowed = self._allows(origin)
        status, body = (200, b"OK") if allowed else (400, b"Disallowed CORS origin")
        answer = [(b"content-length", b"%d" % len(body)), _PLAIN, _PREFLIGHT_VARIES]
        answer += [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _MAX_AGE)]
        if wanted := find(headers, b"access-control-request-headers"):
            answer.append((b"access-control-allow-headers", wanted))
        if allowed:
            answer.append((b"access-control-allow-origin", b"*" if ANY in self.origins else origin))
        to.whole(status, answer, body)
        return status

    def edit(self, request: Headers) -> Edit | None:
        """How the headers of the answer to a request with these headers change: what the worker says about origins is
        replaced. None: they do not."""
        if not self.origins or not find(request, b"origin"):
            return None
        added = self.headers(request)

        def with_origins(headers: Headers) -> Headers:
            kept = [header for header in headers if not header[0].startswith(b"access-control-")]
            if any(name == b"vary" and b"origin" in value.lower() for name, value in kept):
                return [*kept, *(header for header in added if header[0] != b"vary")]
            return [*kept, *added]

        return with_origins

    def _allows(self, origin: bytes) -> bool:
        return ANY in self.origins or origin.decode("latin-1") in self.origins


NO_CORS = Cors()
