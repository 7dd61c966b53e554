"""Which HTTP headers the router passes on, and which end at each hop (RFC 9110 7.6.1)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
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


_NAMES_OTHERS = frozenset({b"close", b"keep-alive"})
"""The values of `Connection` that name no header of this hop alone."""
_ID = b"x-request-id"


def _passed(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    passed, named = [], None
    for header in headers:
        name = header[0]
        if name not in dropped:
            passed.append(header)
        elif name == b"connection" and (value := header[1].lower()) not in _NAMES_OTHERS:
            named = {*(named or ()), *(token.strip() for token in value.split(b","))}
    return passed if named is None else [header for header in passed if header[0] not in named]


class RequestIds:
    """Ids for requests that have none: 32 hexadecimal digits, a random half for this process and a number. No secrets,
    and never the same twice."""

    __slots__ = ("_numbers", "_process")

    def __init__(self) -> None:
        self._process = os.urandom(8).hex().encode()
        self._numbers = itertools.count(1)

    def new(self) -> bytes:
        """The next one."""
        return b"%s%016x" % (self._process, next(self._numbers))


def to_worker(headers: Headers, new_id: Callable[[], bytes]) -> tuple[Headers, bytes, int | None]:
    """The headers a worker gets; the request's id: the client's `x-request-id`, or a `new_id`; and the data-parallel
    rank that the client asks for (None: none), whose header is not among those for the worker. Names are in lower
    case."""
    passed = _passed(headers, _NOT_TO_WORKER)
    request_id, named = b"", None
    for name, value in passed:
        if name == _ID:
            request_id = request_id or value
        elif name == _RANK and named is None:
            named = value
    if not request_id:
        request_id = new_id()
        passed.append((_ID, request_id))
    if named is None:
        return passed, request_id, None
    return [header for header in passed if header[0] != _RANK], request_id, asked_rank(named.decode("latin-1"))


def to_client(headers: Headers, request_id: bytes, added: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers a client gets: the worker's (their names in lower case), `added`, and the request's id unless the
    worker sent one."""
    passed = _passed(headers, _NOT_TO_CLIENT)
    for header in passed:
        if header[0] == _ID:
            break
    else:
        passed.append((_ID, request_id))
    passed += added
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
