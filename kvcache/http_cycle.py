"""One HTTP request and its answer: ASGI's `receive` and `send` on a connection that may break at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import orjson
from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected

from kvcache.logs import event

logger = logging.getLogger(__name__)


class AnswerCut(Exception):
    """Raised by an app that cannot finish an answer it has begun: the connection is closed, so that the client sees
    that the answer is not complete."""


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

    def raw(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """The whole HTTP response."""
        fields = b"".join(b"%s: %s\r\n" % header for header in (*default_headers, *self.headers))
        return STATUS_LINE[self.status] + fields + b"\r\n" + self.body


class Cycle(RequestResponseCycle):
    """One request and its answer. Unlike uvicorn's it tells the app that the client left, and logs no traceback."""

    task: asyncio.Task[None] | None = None
    _head = b""
    """Status line and headers that have not been written yet."""
    _bodiless = False
    _until_close = False

    async def receive(self) -> Message:  # type: ignore[override]
        if self.more_body and not self.disconnected:
            self.more_body = False
            return {"type": "http.request", "body": self.body, "more_body": False}
        if not self.disconnected and not self.response_complete:
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:  # type: ignore[override]
        """As uvicorn's, but the head goes out together with the first piece of the body if that follows at once."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            if self.response_complete:
                return
            raise ClientDisconnected("the client closed the connection")
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._send_head(message["status"], message.get("headers", ()))
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"ASGI message {kind!r} is out of order")

    def _send_head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        lines = [STATUS_LINE[status]]
        self._bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        self._until_close = self.scope["http_version"] == "1.0"  # no chunks there: the body ends with the connection
        self.chunked_encoding = not self._bodiless and not self._until_close
        for name, value in (*self.default_headers, *headers):
            name = name.lower()
            if name == b"content-length":
                self.chunked_encoding = self._until_close = False
                self.expected_content_length = 0 if self._bodiless else int(value)
            elif name == b"transfer-encoding":
                continue  # ours to write
            elif name == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            lines.append(b"%s: %s\r\n" % (name, value))
        count = len(lines)
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        # One line break a line: a header that smuggles in another would make it more.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            self.response_started = False
            raise RuntimeError(f"one of {count - 1} headers holds a line break or a zero byte")
        self._head = head
        asyncio.get_running_loop().call_soon(self._flush_head)

    def _flush_head(self) -> None:
        if self._head and not self.disconnected:
            self.transport.write(self._head)
        self._head = b""

    def _send_body(self, body: bytes, more_body: bool) -> None:
        data = self._head
        self._head = b""
        if self._bodiless:
            pass
        elif self._until_close:
            data += body
        elif self.chunked_encoding:
            if body:
                data = b"%s%x\r\n%s\r\n" % (data, len(body), body)
            if not more_body:
                data += b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more_body):
                raise RuntimeError("the answer's body is not as long as its Content-Length says")
            data = data + body if data else body
        if data:
            self.transport.write(data)
        if not more_body:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except ClientDisconnected:
            pass
        except AnswerCut:
            self.transport.close()
        except asyncio.CancelledError:
            # Either the client left, and there is nobody to answer, or a shutdown's grace period is over.
            await self._fail(Refusal(503, "The server is shutting down.", "ServiceUnavailableError", 1))
        except Exception as error:  # noqa: BLE001  # an app's bug must cost one request, not the process
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            event(logger, logging.ERROR, "app_failed", path=self.scope["path"], error=repr(error), where=where)
            await self._fail(Refusal(500, "Internal Server Error", "InternalServerError"))
        else:
            if not self.response_complete and not self.disconnected:
                event(logger, logging.ERROR, "app_failed", path=self.scope["path"], error="answer is incomplete")
                await self._fail(Refusal(500, "Internal Server Error", "InternalServerError"))

    async def _fail(self, refusal: Refusal) -> None:
        """Answer if nothing has been sent yet; else cut the connection, so that the client sees a cut answer."""
        if self.disconnected or self.response_complete:
            return
        if self.response_started:
            self.transport.close()
            return
        with contextlib.suppress(ClientDisconnected):
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": refusal.headers})
            await self.send({"type": "http.response.body", "body": refusal.body})
