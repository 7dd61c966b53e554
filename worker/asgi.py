"""HTTP as the emulator and the agent serve it: one request over raw ASGI, and GET /metrics.

Starlette's `Request` and `Response` are not used: for each streamed token they cost more than the engine's step.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import orjson
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError

Header = tuple[bytes, bytes]

VARY = (b"vary", b"Origin")
JSON_TYPE = (b"content-type", b"application/json")
SSE_TYPE = (b"content-type", b"text/event-stream; charset=utf-8")
RETRY_AFTER = (b"retry-after", b"1")


class HttpRequest:
    """A request and the one response to it. `common` are headers that every response carries."""

    __slots__ = ("_receive", "_send", "common", "method", "path", "scope")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._receive = receive
        self._send = send
        self.common: tuple[Header, ...] = (VARY,)

    @property
    def query(self) -> str:
        """What follows the path, without its question mark."""
        return bytes(self.scope.get("query_string", b"")).decode("latin-1")

    def header(self, name: bytes) -> str:
        """The first value of the header of this lower-case name, "" when there is none."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return ""

    async def body(self) -> bytes:
        """The whole body; the server bounds its size."""
        message = await self._receive()
        first: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return first
        parts = [first]
        while message.get("more_body", False):
            message = await self._receive()
            parts.append(message.get("body", b""))
        return b"".join(parts)

    async def reply(self, status: int, body: bytes, *headers: Header) -> None:
        """Send a whole response, with its headers in vLLM's order."""
        sent = [(b"content-length", b"%d" % len(body)), *headers, *self.common]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})
        await self._send({"type": "http.response.body", "body": body})

    async def json(self, status: int, value: Any, *headers: Header) -> None:
        """Send a JSON response. The fields keep the order of `value`."""
        await self.reply(status, orjson.dumps(value), JSON_TYPE, *headers)

    async def redirect(self, path: str) -> None:
        """Redirect the client (307) to another path with the same query, method and body."""
        query = self.query.encode("latin-1")
        scheme = self.scope.get("scheme", "http").encode()
        host = self.header(b"host").encode("latin-1")
        location = b"%s://%s%s%s%s" % (scheme, host, quote(path).encode(), b"?" if query else b"", query)
        await self.reply(307, b"", (b"location", location))

    async def error(self, error: ApiError) -> None:
        """Send an error object; a 503 carries `retry-after`."""
        # The message may quote a lone surrogate from the client, which orjson refuses to write.
        body = json.dumps(error.body(), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        await self.reply(error.status, body, JSON_TYPE, *((RETRY_AFTER,) if error.status == 503 else ()))

    async def open_stream(self, *headers: Header) -> None:
        """Send the head of a stream of server-sent events."""
        sent = [*headers, SSE_TYPE, *self.common]
        await self._send({"type": "http.response.start", "status": 200, "headers": sent})

    async def write(self, data: bytes) -> None:
        """Send a part of the stream. Waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close_stream(self, data: bytes = b"") -> None:
        """Send the last part of the stream."""
        await self._send({"type": "http.response.body", "body": data})


class Exposition:
    """GET /metrics: every metric of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def metrics(self, request: HttpRequest, service: object) -> None:
        """Answer in the text format, or in OpenMetrics if `Accept` asks for it."""
        encoder, content_type = choose_encoder(request.header(b"accept"))
        await request.reply(200, encoder(self._registry), (b"content-type", content_type.encode()))


def process_metrics(registry: CollectorRegistry) -> None:
    """Register the metrics of every Python process: memory, CPU, garbage collection, version."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
