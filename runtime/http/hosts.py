"""Which host names a port inside a network answers to: a page of a foreign name must not read it in a browser.

The owner of a name can let it mean 127.0.0.1 while a browser shows its page (DNS rebinding). The browser then takes the
port's answers for that page's own; only the header `Host` still shows the name.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcache.errors import error_body

ANY = "*"
PROGRAM_HEADER = "sec-kvcluster"
"""Our own programs send it, and are answered by any name. No page can: to scripts, headers that begin with `Sec-` are
forbidden (Fetch standard, "forbidden request-header")."""
PROGRAM_HEADERS = {PROGRAM_HEADER: "1"}
_PROGRAM = PROGRAM_HEADER.encode()
PRIVATE = (".svc", ".cluster.local", ".localhost", ".internal")
"""Ends of names that nobody can register: Services and pods in Kubernetes, this machine, and private networks."""


def host_name(value: str) -> str:
    """The host of a `Host` header, in lower case, without its port and without the brackets of an IPv6 address."""
    host = value.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


@dataclass(frozen=True, slots=True)
class HostCheck:
    """An ASGI application that passes on the requests for names that are taken, and answers others 421 (RFC 9110,
    15.5.20).

    Taken are IP addresses, names of one label, those that end in one of `PRIVATE`, and `names`: as they are, or, if one
    begins with a dot, with anything before it; `ANY` stands for all. A request without a host, or with
    `PROGRAM_HEADER`, comes from no page. `setting`: in words, what to change for another name.
    """

    app: ASGIApp
    setting: str
    names: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = host_name(headers.get(b"host", b"").decode("latin-1"))
            if not self.takes(host) and _PROGRAM not in headers:
                await self._refusal(host)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def takes(self, host: str) -> bool:
        """Whether requests for this host, as `host_name` gives it, are answered."""
        return (
            "." not in host
            or host.endswith(PRIVATE)
            or _is_address(host)
            or any(name in (ANY, host) or (name.startswith(".") and host.endswith(name)) for name in self.names)
        )

    def _refusal(self, host: str) -> Response:
        message = (
            f"this port does not answer to the name {host!r:.255}: use an IP address or localhost, or {self.setting}"
        )
        body = orjson.dumps(error_body(message, "MisdirectedRequestError", None, 421))
        return Response(body, 421, media_type="application/json")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
