"""What vLLM answers to a browser that asks whether a page may call it: by default, no page may."""

from __future__ import annotations

from worker.http import Exchange, Header

METHODS = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"
_ASKS = b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"


def is_preflight(exchange: Exchange) -> bool:
    """Whether this asks what a page may do, instead of doing it."""
    return (
        exchange.method == "OPTIONS"
        and bool(exchange.header(b"origin"))
        and bool(exchange.header(b"access-control-request-method"))
    )


async def refuse(exchange: Exchange) -> None:
    """Answer a preflight."""
    asked: Header = (
        b"access-control-allow-headers",
        exchange.header(b"access-control-request-headers").encode("latin-1"),
    )
    exchange.common = ()
    await exchange.reply(
        400,
        b"Disallowed CORS origin",
        (b"vary", _ASKS),
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"600"),
        *((asked,) if asked[1] else ()),
        (b"content-type", b"text/plain; charset=utf-8"),
    )
