"""Which of a worker's paths clients may reach, and which requests may safely be sent twice."""

from __future__ import annotations

import unicodedata
from enum import Enum

from kvcache.paths import COMPUTED, RESOURCES

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""The methods that are idempotent by definition (RFC 9110 9.2.2), of those that workers know."""


class Access(Enum):
    """What the router does with a request for a path."""

    PASSED = "passed"
    """It is sent to a worker."""
    CLOSED = "closed"
    """It is refused: the path is under /v1/ but not part of an inference API, and is not allowed by name."""
    UNKNOWN = "unknown"
    """It is not found: clients need no such path of a worker, or two servers might interpret it in two ways."""


def access(path: str, allowed: frozenset[str] = frozenset()) -> Access:
    """Whether clients may reach a path, which has been percent-decoded once, as the worker's server will do.
    O(length of the path)."""
    if path in COMPUTED:
        return Access.PASSED
    if not is_plain(path):
        return Access.UNKNOWN
    if path in allowed:
        return Access.PASSED
    if not path.startswith("/v1/") or path == "/v1/":
        return Access.UNKNOWN
    return Access.PASSED if path.split("/", 3)[2] in RESOURCES else Access.CLOSED


def is_plain(path: str) -> bool:
    """Whether every server interprets this decoded path in the same way.

    A path is not plain if decoding it again would change it (`%2e`, sent as `%252e`), or if it holds anything that is
    not UTF-8, control characters, `.` or `..` in any spelling (backslashes, `..;x`, compatibility forms of the dot), or
    empty segments: another server may resolve any of these to a path that is closed to clients.
    """
    if not path.startswith("/") or "%" in path or "\ufffd" in path or not path.isprintable():
        return False
    plain = path if path.isascii() else unicodedata.normalize("NFKC", path)
    if "\\" in plain:
        return False
    *segments, last = plain.split("/")[1:]
    return all(_is_name(segment) for segment in segments) and (not last or _is_name(last))


def _is_name(segment: str) -> bool:
    return segment.partition(";")[0].strip() not in ("", ".", "..")


def repeatable(method: str, path: str) -> bool:
    """Whether sending the request twice has no other effect than sending it once (RFC 9110 9.2.2)."""
    return method in SAFE_METHODS or (method == "POST" and path in COMPUTED)
