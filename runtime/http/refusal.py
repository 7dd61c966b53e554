"""Requests that the HTTP server answers itself, because they break a bound: in the error shape of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

import orjson

Headers = Iterable[tuple[bytes, bytes]]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


STATUS_LINE = {status: f"HTTP/1.1 {status} {_phrase(status)}\r\n".encode() for status in range(100, 1000)}


class Refusal(Exception):
    """A request breaks a bound; raised inside a parser callback it stops the parser."""

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

    def raw(self, further: Headers) -> bytes:
        """The whole HTTP response."""
        fields = b"".join(b"%s: %s\r\n" % header for header in (*further, *self.headers))
        return STATUS_LINE[self.status] + fields + b"\r\n" + self.body
