"""Bounded HTTP/1.1 serving of an ASGI app: what worker and router put between the network and their handlers.

Built on uvicorn's httptools protocol, with every resource a client can hold given a bound (`HttpLimits`). The app
is called once the whole request has arrived: a slow or oversized upload costs no task, and the app's first
`receive()` returns the complete body. What breaks a bound is answered here, in the error shape of OpenAI and
vLLM, and the connection is closed.

uvicorn's own `Server` was rejected: it wakes ten times a second when idle, and at shutdown it drops idle keep-alive
connections while a client may be writing its next request to one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Literal, cast
from urllib.parse import unquote

import httptools
import orjson
import uvloop
from starlette.types import ASGIApp, Message
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected, get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from kvcache.logs import event

logger = logging.getLogger(__name__)

BACKLOG = 2048
LINGER = 2.0
"""Seconds a refused connection is still read (and thrown away): closing it with unread bytes would reset it, and
the client might never see the answer that says why."""
LAME_DUCK = 0.25
"""Seconds idle connections stay open at shutdown, so that a request already on its way is answered."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may hold. Bytes and seconds."""

    max_header_bytes: int = 65_536
    max_headers: int = 256
    max_body_bytes: int = 16 * 2**20
    header_timeout: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_timeout: float = 30.0
    """Longest silence while a body arrives."""
    write_timeout: float = 30.0
    """Longest time a client may leave a full send buffer unread."""
    keep_alive: float = 75.0
    """How long a connection may be idle between requests, or before its first."""
    max_concurrent_requests: int | None = None
    """Requests between the end of their headers and the end of their answer; None = no bound."""


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    sock.setblocking(False)
    return sock


def inherited(fd: int) -> socket.socket:
    """The listening socket a parent process passed on as file descriptor `fd`. Raises `OSError`.

    Connection attempts made while no process accepts wait in its backlog: a restart loses none.
    """
    sock = socket.socket(fileno=fd)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise OSError(f"file descriptor {fd} is not a listening socket: bind and listen before passing it on")
    sock.setblocking(False)
    return sock


class AnswerCut(Exception):
    """Raised by an app that cannot finish an answer it has begun: the connection is closed, so that the client sees
    that the answer is not complete."""


class _Refusal(Exception):
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


class _State(ServerState):
    """What the connections of one server share."""

    connections: set[_Connection]  # type: ignore[assignment]

    def __init__(self, limits: HttpLimits, cancel_on_disconnect: bool, on_refusal: Callable[[int], None]) -> None:
        super().__init__()
        self.limits = limits
        self.cancel_on_disconnect = cancel_on_disconnect
        self.on_refusal = on_refusal
        self.in_flight = 0
        self.stopping = False
        self.changed = asyncio.Event()
        """Set when a connection goes away: `HttpServer.stop` looks again."""
        self._second = 0

    def date_headers(self) -> list[tuple[bytes, bytes]]:
        """`date` and `server`; renewed when a second has passed, never by a timer."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self.default_headers = [(b"date", formatdate(now, usegmt=True).encode()), (b"server", b"uvicorn")]
        return self.default_headers


class _Cycle(RequestResponseCycle):
    """One request and its answer. Unlike uvicorn's it tells the app that the client left, and logs no traceback."""

    task: asyncio.Task[None] | None = None

    async def receive(self) -> Message:  # type: ignore[override]
        if self.more_body and not self.disconnected:
            self.more_body = False
            return {"type": "http.request", "body": self.body, "more_body": False}
        if not self.disconnected and not self.response_complete:
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:  # type: ignore[override]
        await super().send(message)  # type: ignore[arg-type]
        if self.disconnected and not self.response_complete:
            raise ClientDisconnected("the client closed the connection")

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except ClientDisconnected:
            pass
        except AnswerCut:
            self.transport.close()
        except asyncio.CancelledError:
            # Either the client left, and there is nobody to answer, or a shutdown's grace period is over.
            await self._fail(_Refusal(503, "The server is shutting down.", "ServiceUnavailableError", 1))
        except Exception as error:  # noqa: BLE001  # an app's bug must cost one request, not the process
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            event(logger, logging.ERROR, "app_failed", path=self.scope["path"], error=repr(error), where=where)
            await self._fail(_Refusal(500, "Internal Server Error", "InternalServerError"))
        else:
            if not self.response_complete and not self.disconnected:
                event(logger, logging.ERROR, "app_failed", path=self.scope["path"], error="answer is incomplete")
                await self._fail(_Refusal(500, "Internal Server Error", "InternalServerError"))

    async def _fail(self, refusal: _Refusal) -> None:
        """Answer if nothing has been sent yet; else cut the connection, so that the client sees a cut answer."""
        if self.disconnected or self.response_complete:
            return
        if self.response_started:
            self.transport.close()
            return
        with contextlib.suppress(ClientDisconnected):
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": refusal.headers})
            await self.send({"type": "http.response.body", "body": refusal.body})


class _Connection(HttpToolsProtocol):
    """One client connection.

    `_stage` is where the request being read stands: "idle" (no byte of it has come; timer: `keep_alive`, unless an
    answer is under way), "headers" (timer: `header_timeout`), "body" (timer: `body_timeout`). One timer serves all
    three. `cycle` is the request being answered, `pipeline` holds those that arrived meanwhile.
    """

    server_state: _State
    cycle: _Cycle | None  # type: ignore[assignment]
    pipeline: deque[_Cycle]  # type: ignore[assignment]

    def __init__(self, config: Config, state: _State, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config=config, server_state=state, app_state={}, _loop=loop)
        self.access_log = False
        self._limits = state.limits
        self._stage: Literal["idle", "headers", "body"] = "idle"
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal: _Refusal | None = None
        self._discarding = False
        self._counted = 0
        self._body: list[bytes] = []
        self._header_bytes = self._body_bytes = 0
        self._keep_alive = True

    # --- transport ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        self.server = get_local_addr(transport)
        self.client = get_remote_addr(transport)
        self.scheme = "http"
        self._set_timer(self._limits.keep_alive, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        state, cycle = self.server_state, self.cycle
        state.connections.discard(self)
        self._release(self._counted)
        self._set_timer(None)
        self.pipeline.clear()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if state.cancel_on_disconnect and cycle.task is not None:
                cycle.task.cancel("the client disconnected")
        self.resume_writing()
        self.parser = None  # it refers to this protocol
        state.changed.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._guard_writing()

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _guard_writing(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout, self._unread)

    def _unread(self) -> None:
        event(logger, logging.INFO, "client_dropped", why="it does not read its answer", client=str(self.client))
        self.transport.abort()

    def _set_timer(self, delay: float | None, then: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(delay, then) if delay is not None and then is not None else None

    def _close(self) -> None:
        """Close once the client has read what was written, or after `write_timeout`."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._guard_writing()

    def _release(self, requests: int) -> None:
        self._counted -= requests
        self.server_state.in_flight -= requests

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        stage = self._stage
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal or _Refusal(400, "Invalid HTTP request received."))
            return
        if self._stage == "headers":
            if stage != "headers":
                self._set_timer(self._limits.header_timeout, self._silent)
                return
            # The parser keeps an unfinished header to itself, so what arrives is counted here too.
            self._header_bytes += len(data)
            if self._header_bytes > 2 * self._limits.max_header_bytes:
                self._refuse(self._headers_too_large())
        elif self._stage == "body":
            self._set_timer(self._limits.body_timeout, self._silent)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Serve as HTTP/1.1 a request that offers another protocol (h2c, WebSocket), as RFC 9110 7.8 allows.

        The parser takes what follows such a head for the other protocol, and so would lose the body (Java's HTTP client
        offers h2c with every POST): read the request again without its offer.
        """
        self.parser = httptools.HttpRequestParser(self)
        offer = (b"connection", b"upgrade", b"http2-settings")
        head = b"%s %s HTTP/1.1\r\n" % (self.scope["method"].encode(), self.url)
        fields = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] not in offer)
        self.parser.feed_data(head + fields + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._set_timer(None)
        self._stage = "headers"
        self._header_bytes = self._body_bytes = 0
        self._body = []

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        if len(self.headers) >= self._limits.max_headers:
            raise self._refused(
                _Refusal(
                    431, f"The request has more than {self._limits.max_headers} headers.", "RequestHeadersTooLarge"
                )
            )
        name = name.lower()
        self.headers.append((name, value))
        if name == b"content-length" and int(value) > self._limits.max_body_bytes:
            self._body_bytes = int(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        state, limits = self.server_state, self._limits
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
            return  # see _decline_upgrade
        if self._body_bytes > limits.max_body_bytes:
            raise self._refused(self._body_too_large())
        if limits.max_concurrent_requests is not None and state.in_flight >= limits.max_concurrent_requests:
            message = f"The server is busy with {state.in_flight} requests, which is its limit."
            raise self._refused(_Refusal(503, message, "ServiceUnavailableError", retry_after=1))
        parsed = httptools.parse_url(self.url)
        raw_path = parsed.path or b"/"
        path = raw_path.decode("ascii")
        version = self.parser.get_http_version()
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = parsed.query or b""
        self._keep_alive = version != "1.0" and self.parser.should_keep_alive()
        self._stage = "body"
        self._set_timer(None)
        self._counted += 1
        state.in_flight += 1
        if self.expect_100_continue and self.cycle is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._refused(self._body_too_large())
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._stage != "body":
            return  # see _decline_upgrade
        self._stage = "idle"
        self._set_timer(None)
        state = self.server_state
        cycle = _Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=state.date_headers(),
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=self._keep_alive and not state.stopping,
            on_response=self.on_response_complete,
        )
        cycle.body = b"".join(self._body)  # type: ignore[assignment]
        self._body = []
        if self.cycle is None:
            self._start(cycle)
        else:
            self.flow.pause_reading()
            self.pipeline.append(cycle)

    # --- answering ---

    def _start(self, cycle: _Cycle) -> None:
        self.cycle = cycle
        cycle.task = task = self.loop.create_task(cycle.run_asgi(cast(ASGIApp, self.app)))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        self.cycle = None
        self.server_state.total_requests += 1
        self._release(1)
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size():
                self._guard_writing()
        elif self.pipeline:
            self._start(self.pipeline.popleft())
        elif self.server_state.stopping:
            self._close()
        else:
            self.flow.resume_reading()
            if self._stage == "idle":
                self._set_timer(self._limits.keep_alive, self._close)

    # --- refusing ---

    def _refused(self, refusal: _Refusal) -> _Refusal:
        self._refusal = refusal
        return refusal

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.max_header_bytes:
            raise self._refused(self._headers_too_large())

    def _headers_too_large(self) -> _Refusal:
        message = f"The request's headers take more than {self._limits.max_header_bytes} bytes."
        return _Refusal(431, message, "RequestHeadersTooLarge")

    def _body_too_large(self) -> _Refusal:
        message = f"The request's body takes more than {self._limits.max_body_bytes} bytes."
        return _Refusal(413, message, "RequestEntityTooLarge")

    def _silent(self) -> None:
        self._refuse(_Refusal(408, f"The request's {self._stage} did not arrive in time.", "RequestTimeout"))

    def _refuse(self, refusal: _Refusal) -> None:
        """Answer what cannot be served, then read and discard for a while before closing."""
        self._discarding = True
        if self._stage == "body":
            self._release(1)
        self._body = []
        self.server_state.on_refusal(refusal.status)
        if self.cycle is not None:  # the answer under way is finished; nothing may be written into it
            self._release(len(self.pipeline))
            self.pipeline.clear()
            self.cycle.keep_alive = False
            return
        self.transport.write(refusal.raw(self.server_state.date_headers()))
        self.transport.write_eof()
        self._set_timer(LINGER, self.transport.abort)

    # --- stopping ---

    def shutdown(self) -> None:
        """Close after the answer under way."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        if self.cycle is None and self._stage == "idle":
            self._close()


class HttpServer:
    """Serves one ASGI app on one listening socket.

    `cancel_on_disconnect` cancels the app's task when its client leaves; otherwise the app learns of it from
    `receive()` (`http.disconnect`) or from `OSError` out of `send()`. `on_refusal` is called with the status of every
    request refused here. ASGI's lifespan protocol is not spoken: whoever starts the server owns what the app needs.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        limits: HttpLimits | None = None,
        *,
        cancel_on_disconnect: bool = False,
        on_refusal: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._sock = sock
        self.port: int = sock.getsockname()[1]
        self._state = _State(limits or HttpLimits(), cancel_on_disconnect, on_refusal)
        self._config = Config(
            cast(Any, app), http=_Connection, ws="none", lifespan="off", interface="asgi3", log_config=None,
            proxy_headers=False,
        )  # fmt: skip
        self._config.load()
        self._listener: asyncio.Server | None = None

    @property
    def in_flight(self) -> int:
        """Requests whose headers have arrived and whose answer is not complete."""
        return self._state.in_flight

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._state.connections)

    async def start(self) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Connection(self._config, self._state, loop), sock=self._sock, backlog=BACKLOG
        )

    async def stop(self, grace: float) -> None:
        """Stop accepting, let answers under way finish for up to `grace` seconds, then cut what is left.

        Every answer begun from now on says `Connection: close`. Safe to call twice.
        """
        state = self._state
        state.stopping = True
        if self._listener is not None:
            self._listener.close()
        end = time.monotonic() + grace
        for connection in list(state.connections):
            connection.shutdown()
        await self._until_closed(min(LAME_DUCK, grace))
        for connection in list(state.connections):
            connection.close_if_idle()
        await self._until_closed(end - time.monotonic())
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel("the grace period is over")
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(state.connections):
            connection.transport.abort()

    async def _until_closed(self, seconds: float) -> None:
        state = self._state
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                while state.connections:
                    state.changed.clear()
                    await state.changed.wait()


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main` on uvloop and return its exit code. Its event is set at SIGTERM or SIGINT; a second one cancels it."""

    async def guarded() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main(stop))

        def on_signal() -> None:
            if stop.is_set():
                task.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            return await task
        except asyncio.CancelledError:
            return 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(guarded())
