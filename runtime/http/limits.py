"""What clients of an HTTP server may hold, and the answer to a request that breaks a limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

import orjson


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may hold, and (`max_total_body_bytes`, `max_concurrent_requests`) all of them together. Bytes
    and seconds."""

    max_header_bytes: int = 65_536
    max_headers: int = 256
    max_body_bytes: int = 16 * 2**20
    max_total_body_bytes: int | None = None
    """Bodies of all requests whose answers have not begun; None = no limit but the number of requests."""
    header_timeout: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_timeout: float = 30.0
    """Longest silence while a body arrives."""
    write_timeout: float = 30.0
    """Longest time a client may leave a full send buffer unread."""
    keep_alive: float = 75.0
    """How long a connection may be idle between requests, or before its first."""
    max_concurrent_requests: int | None = None
    """Requests between the end of their headers and the end of their answer; None = no limit."""


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


STATUS_LINE = {status: f"HTTP/1.1 {status} {_phrase(status)}\r\n".encode() for status in range(100, 1000)}


class Refusal(Exception):
    """A request breaks a limit, and the server answers it itself, in the error shape of OpenAI and vLLM. Raised inside
    a parser callback it stops the parser."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        body = orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})
        self.headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if retry_after is not None:
            self.headers.append((b"retry-after", b"%d" % retry_after))
        self.body = body

    def raw(self, further: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The whole HTTP response, with these headers too."""
        fields = b"".join(b"%s: %s\r\n" % header for header in (*further, *self.headers))
        return STATUS_LINE[self.status] + fields + b"\r\n" + self.body
