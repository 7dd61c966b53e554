"""What vLLM answers to a browser that asks whether a page may call it: by default, no page may."""

from __future__ import annotations

from worker.asgi import Header, HttpRequest

METHODS = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"
_ASKS = b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"


def is_preflight(raw_request: HttpRequest) -> bool:
    """Whether this asks what a page may do, instead of doing it."""
    return (
        raw_request.method == "OPTIONS"
        and bool(raw_request.header(b"origin"))
        and bool(raw_request.header(b"access-control-request-method"))
    )


async def refuse(raw_request: HttpRequest) -> None:
    """Answer a preflight."""
    asked: Header = (
        b"access-control-allow-headers",
        raw_request.header(b"access-control-request-headers").encode("latin-1"),
    )
    raw_request.common = ()
    await raw_request.reply(
        400,
        b"Disallowed CORS origin",
        (b"vary", _ASKS),
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"600"),
        *((asked,) if asked[1] else ()),
        (b"content-type", b"text/plain; charset=utf-8"),
    )
