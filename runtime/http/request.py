"""One HTTP request and its answer: ASGI's `receive` and `send` on a connection that may break at any moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable, Mapping
from enum import Enum
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from runtime.http.context import Handler
from runtime.http.limits import STATUS_LINE, Refusal
from runtime.inline import Cancellable
from runtime.logs import EventLogger

logger = EventLogger(__name__)


class AnswerAborted(Exception):
    """Raised by an app that cannot finish an answer it has begun: the connection is closed, so that the client sees
    that the answer is not complete."""


class ClientDisconnected(OSError):
    """Raised out of `send`: the client closed the connection, or was dropped."""


class AnswerState(Enum):
    """How far an answer has got."""

    __hash__ = object.__hash__  # Enum's is a Python function, called for each transition of each request

    PENDING = "pending"
    """The app has said nothing."""
    HELD = "held"
    """Status and headers are known, and wait for the first piece of the body or the loop's next turn."""
    BEGUN = "begun"
    """Status and headers have gone out."""
    COMPLETE = "complete"
    ABORTED = "aborted"
    """It will never be complete: the client left, or the app could not finish it."""


class AnswerEvent(Enum):
    """What moves an answer on."""

    __hash__ = object.__hash__  # Enum's is a Python function, called for each transition of each request

    HEAD_MADE = "head made"
    SENT = "sent"
    """Something was sent, and more follows."""
    FINISHED = "finished"
    ABORTED = "aborted"


ANSWER_TRANSITIONS: Mapping[AnswerState, Mapping[AnswerEvent, AnswerState]] = {
    AnswerState.PENDING: {AnswerEvent.HEAD_MADE: AnswerState.HELD, AnswerEvent.ABORTED: AnswerState.ABORTED},
    AnswerState.HELD: {
        AnswerEvent.SENT: AnswerState.BEGUN,
        AnswerEvent.FINISHED: AnswerState.COMPLETE,
        AnswerEvent.ABORTED: AnswerState.ABORTED,
    },
    AnswerState.BEGUN: {AnswerEvent.FINISHED: AnswerState.COMPLETE, AnswerEvent.ABORTED: AnswerState.ABORTED},
    AnswerState.COMPLETE: {},
    AnswerState.ABORTED: {},
}
"""What is not listed cannot happen, and is an error."""
_OVER = frozenset({AnswerState.COMPLETE, AnswerState.ABORTED})


_FRAMING = frozenset({b"connection", b"content-length", b"transfer-encoding"})
"""Headers that say where an answer ends."""


class Framing(Enum):
    """How the client sees where the body ends."""

    NONE = "none"
    """There is none: the answer to HEAD, 204, 304."""
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"
    """HTTP/1.0 knows no chunks."""


class AnswerTransport(Protocol):
    """The connection, as an answer sees it."""

    @property
    def writable(self) -> bool:
        """The client takes what is written."""

    async def drain(self) -> None:
        """Wait until it is writable, or gone."""

    def write(self, data: bytes) -> None:
        """Send; nothing happens when the connection is gone."""

    def release_body(self, size: int) -> None:
        """So many bytes of the request's body are held no more."""

    def answered(self) -> None:
        """The answer is complete."""

    def close(self) -> None:
        """The answer cannot be completed: close once what was written is sent."""

    def common_headers(self) -> Iterable[tuple[bytes, bytes]]:
        """What every answer carries."""

    def refusal_headers(self, request: list[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
        """What an answer that is not the app's carries, given the request's headers."""


class ServerRequest:
    """One request and its answer. `keep_alive` may turn False until the answer's head is made."""

    __slots__ = (
        "_body",
        "_framing",
        "_head",
        "_missing",
        "_over",
        "_state",
        "_transport",
        "held_bytes",
        "keep_alive",
        "scope",
        "task",
    )

    def __init__(self, transport: AnswerTransport, scope: Scope, body: bytes | bytearray, keep_alive: bool) -> None:
        self._transport = transport
        self.scope = scope
        self._body: bytes | bytearray | None = body
        self.held_bytes = len(body)
        """Bytes of the request's body, counted until its answer begins: an app that has begun to answer has no more
        need of the body, and keeps none of it."""
        self.keep_alive = keep_alive
        self.task: Cancellable | None = None
        self._state = AnswerState.PENDING
        self._framing = Framing.CHUNKED
        self._missing = 0
        """Bytes of the body that Content-Length announced and that have not been sent."""
        self._head = b""
        self._over: asyncio.Event | None = None

    @property
    def running(self) -> Cancellable:
        """What answers it."""
        if self.task is None:
            raise RuntimeError("nothing answers this request yet")
        return self.task

    @property
    def state(self) -> AnswerState:
        return self._state

    def _advance(self, event: AnswerEvent) -> None:
        """The only way in which the state changes."""
        try:
            self._state = state = ANSWER_TRANSITIONS[self._state][event]
        except KeyError:
            raise RuntimeError(f"an answer in state {self._state.value!r} takes no event {event.value!r}") from None
        if state is AnswerState.BEGUN:
            held, self.held_bytes = self.held_bytes, 0
            self._transport.release_body(held)
        elif state in _OVER:
            self._body = None
            if self._over is not None:
                self._over.set()

    def disconnected(self) -> None:
        """The connection is gone. Safe to call twice."""
        if self._state not in _OVER:
            self._advance(AnswerEvent.ABORTED)

    # --- ASGI ---

    async def receive(self) -> Message:
        """The whole body first, then (when it is so) that the client left."""
        body = self._body
        if body is not None:
            self._body = None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._state not in _OVER:
            if self._over is None:
                self._over = asyncio.Event()
            await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """The head goes out together with the first piece of the body, if that follows at once."""
        if not self._transport.writable:
            await self.drain()
        kind = message["type"]
        if kind == "http.response.start":
            self.begin(message["status"], message.get("headers", ()))
        elif kind == "http.response.body":
            self.write(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"ASGI message {kind!r} is unknown")

    # --- without ASGI ---

    @property
    def writable(self) -> bool:
        """The client takes what is written. If not, `drain` before anything else is."""
        return self._transport.writable

    async def drain(self) -> None:
        """Wait until the client takes what is written, or has left."""
        if self._state not in _OVER:
            await self._transport.drain()

    def take_body(self) -> bytes:
        """The request's body, once. It may be a bytearray, which nobody may change."""
        body, self._body = self._body, None
        return body or b""  # type: ignore[return-value]

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The head of the answer. It goes out with the first piece of the body, if that follows at once. Raises
        `ClientDisconnected`."""
        state = self._state
        if state is not AnswerState.PENDING:
            self._out_of_order("head")
        self._make_head(status, headers)

    def write(self, data: bytes, *, last: bool = False) -> bool:
        """A piece of the body. Returns whether the client takes more: if not, `drain` first. Raises
        `ClientDisconnected`."""
        state = self._state
        if state is AnswerState.BEGUN and self._framing is Framing.CHUNKED and data and not last:
            # Most pieces are events in the middle of a stream.
            self._transport.write(b"%x\r\n%s\r\n" % (len(data), data))
            return self._transport.writable
        if state is not AnswerState.BEGUN and state is not AnswerState.HELD:
            self._out_of_order("body")
        self._send_body(data, not last)
        return self._transport.writable

    def _out_of_order(self, what: str) -> None:
        if self._state is AnswerState.ABORTED:
            raise ClientDisconnected("the client closed the connection")
        raise RuntimeError(f"the answer's {what} is out of order: the answer is {self._state.value}")

    def _make_head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines = [STATUS_LINE[status]]
        keep_alive = self.keep_alive
        if self.scope["method"] == "HEAD" or status in (204, 304):
            framing = Framing.NONE
        elif self.scope["http_version"] == "1.0":
            framing = Framing.UNTIL_CLOSE
        else:
            framing = Framing.CHUNKED
        for header in (*self._transport.common_headers(), *headers):
            name = header[0].lower()
            if name in _FRAMING:
                value = header[1]
                if name == b"connection":
                    keep_alive = keep_alive and value.lower() != b"close"
                if name != b"content-length":
                    continue  # ours to write
                if framing is not Framing.NONE:
                    framing = Framing.LENGTH
                    self._missing = int(value)
            lines.append(b"%s: %s\r\n" % (name, header[1]))
        count = len(lines)
        if not keep_alive:
            lines.append(b"connection: close\r\n")
        if framing is Framing.CHUNKED:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        # One line break a line: a header that smuggles in another would make it more.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError(f"one of {count - 1} headers holds a line break or a zero byte")
        self._framing = framing
        self.keep_alive = keep_alive
        self._head = head
        self._advance(AnswerEvent.HEAD_MADE)
        asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._state is AnswerState.HELD:
            head, self._head = self._head, b""
            self._advance(AnswerEvent.SENT)
            self._transport.write(head)

    def _send_body(self, body: bytes, more_body: bool) -> None:
        framing = self._framing
        data = self._head
        if framing is Framing.CHUNKED:
            if body:
                data = b"%s%x\r\n%s\r\n" % (data, len(body), body)
            if not more_body:
                data += b"0\r\n\r\n"
        elif framing is Framing.LENGTH:
            missing = self._missing - len(body)
            if missing < 0 or (missing and not more_body):
                raise RuntimeError("the answer's body is not as long as its Content-Length says")
            self._missing = missing
            data = data + body if data else body
        elif framing is Framing.UNTIL_CLOSE:
            data += body
        self._head = b""
        if not more_body:
            self._advance(AnswerEvent.FINISHED)
        elif self._state is AnswerState.HELD:
            self._advance(AnswerEvent.SENT)
        if data:
            self._transport.write(data)
        if not more_body:
            self._transport.answered()

    # --- the app ---

    async def run(self, app: ASGIApp) -> None:
        """Let the app answer; whatever it does, the client gets a whole answer or sees that it is not whole."""
        await self._guard(app(self.scope, self.receive, self.send))

    async def handle(self, handler: Handler) -> None:
        """Let the handler answer; as `run`."""
        await self._guard(handler(self))

    async def _guard(self, answer: Awaitable[None]) -> None:
        try:
            await answer
        except ClientDisconnected:
            pass
        except AnswerAborted:
            self._abort()
        except asyncio.CancelledError:
            # Either the client left, and there is nobody to answer, or a shutdown's grace period is over.
            await self._fail(Refusal(503, "The server is shutting down.", "ServiceUnavailableError", 1))
        except Exception as error:  # noqa: BLE001  # an app's bug must cost one request, not the process
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            logger.error("app_failed", path=self.scope["path"], error=repr(error), where=where)
            await self._fail(Refusal(500, "Internal Server Error", "InternalServerError"))
        except GeneratorExit:
            raise
        except BaseException:
            self._abort()
            raise
        if self._state not in _OVER:
            logger.error("app_failed", path=self.scope["path"], error="answer is incomplete")
            await self._fail(Refusal(500, "Internal Server Error", "InternalServerError"))

    async def _fail(self, refusal: Refusal) -> None:
        """Answer if nothing has been sent yet; else close the connection, so that the client sees that
        the answer is not whole."""
        if self._state is not AnswerState.PENDING:
            self._abort()
            return
        headers = [*refusal.headers, *self._transport.refusal_headers(self.scope["headers"])]
        with contextlib.suppress(ClientDisconnected):
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": refusal.body})

    def _abort(self) -> None:
        if self._state not in _OVER:
            self._flush()
            self._advance(AnswerEvent.ABORTED)
            self._transport.close()
