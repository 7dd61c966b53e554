"""What a worker is called, and the URL under which a router reaches it."""

from __future__ import annotations

import socket
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, AnyHttpUrl, TypeAdapter

_HTTP_URL: TypeAdapter[AnyHttpUrl] = TypeAdapter(AnyHttpUrl)

_WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104
"""Hosts that stand for every address of the machine."""


def base_url(value: str) -> str:
    """The URL without a slash at its end. Raises `ValueError` if it is no URL of HTTP."""
    _HTTP_URL.validate_python(value)
    return value.rstrip("/")


BaseUrl = Annotated[str, AfterValidator(base_url)]
"""A setting that `base_url` checks."""


def default_worker_id(host: str, port: int) -> str:
    """`host:port`, with the machine's name for a host that stands for every address."""
    return f"{socket.gethostname() if host in _WILDCARDS else host}:{port}"


def advertised_url(host: str, port: int, router_url: str) -> str:
    """The URL under which the router at `router_url` reaches a server that listens on `host`.

    For a server on every address that is the address which this machine uses to reach the router.
    """
    if host in _WILDCARDS:
        host = _address_towards(router_url)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address_towards(url: str) -> str:
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # selects a route and an address; sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
