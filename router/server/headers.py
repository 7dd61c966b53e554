"""Which HTTP headers the router passes on, and which end at each hop (RFC 9110 7.6.1)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import datetime
from email.utils import parsedate_to_datetime

from kvcache.ranks import RANK_HEADER, asked_rank
from runtime.http.context import Headers

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_TO_WORKER = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"http2-settings"}
"""The request to the worker has a host, a length and an upgrade of its own."""
_RANK = RANK_HEADER.encode()
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"date", b"server"}
"""The router's own server writes the last two."""


def _passed(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    passed = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"connection" and value.lower() not in (b"close", b"keep-alive"):
            dropped = dropped | {token.strip() for token in value.lower().split(b",")}
        passed.append((lower, value))
    return [header for header in passed if header[0] not in dropped]


def to_worker(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, bytes, int | None]:
    """The headers a worker gets; the request's id: the client's `x-request-id`, or a new one; and the data-parallel
    rank that the client asks for (None: none), whose header is not among those for the worker."""
    passed = _passed(headers, _NOT_TO_WORKER)
    request_id, named = b"", None
    for name, value in passed:
        if name == b"x-request-id":
            request_id = request_id or value
        elif name == _RANK and named is None:
            named = value
    if not request_id:
        request_id = uuid.uuid4().hex.encode()
        passed.append((b"x-request-id", request_id))
    if named is None:
        return passed, request_id, None
    return [header for header in passed if header[0] != _RANK], request_id, asked_rank(named.decode("latin-1"))


def to_client(headers: Iterable[tuple[bytes, bytes]], request_id: bytes, added: Headers) -> Headers:
    """The headers a client gets: the worker's, `added`, and the request's id unless the worker sent one."""
    passed = _passed(headers, _NOT_TO_CLIENT)
    if not any(name == b"x-request-id" for name, _ in passed):
        passed.append((b"x-request-id", request_id))
    passed.extend(added)
    return passed


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Value of the first header of this name (in lower case); empty if there is none."""
    for at, value in headers:
        if at.lower() == name:
            return value
    return b""


def retry_after(headers: Headers, now: datetime) -> float | None:
    """Seconds that a Retry-After states, as a number or as a date (RFC 9110 10.2.3). None if there is none that makes
    sense. `now` is the wall clock's time, with a time zone.
    """
    value = find(headers, b"retry-after").decode("latin-1").strip()
    if value.isdecimal() and value.isascii():
        return float(value[:9])
    try:
        return max((parsedate_to_datetime(value) - now).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
