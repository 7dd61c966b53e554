"""Bounded HTTP/1.1 serving of an ASGI app: what worker and router put between the network and their handlers.

Everything that a client can hold has a limit (`HttpLimits`). The app is called once the whole request has arrived: a
slow or oversized upload costs no task, and the app's first `receive()` returns the complete body. What breaks a limit
is answered here, in the error shape of OpenAI and vLLM, and the connection is closed.

uvicorn was rejected: its `Server` wakes ten times a second when idle, and at shutdown it drops idle keep-alive
connections while a client may be writing its next request to one; its protocol limits nothing, and is no public API.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from starlette.types import ASGIApp, Scope

from runtime.http.connection import ServerConnection
from runtime.http.context import Handler, Headers, ServerContext, ServerEvent
from runtime.http.limits import HttpLimits, Refusal
from runtime.http.request import AnswerAborted
from runtime.sockets import BACKLOG
from runtime.tls_listener import TlsListener, TlsPort

__all__ = ["AnswerAborted", "HttpLimits", "HttpServer"]

HANDSHAKE_GRACE = 1.0
"""Seconds that a TLS handshake under way may take when a server stops: a request may follow it."""
QUIET_BEFORE_CLOSING = 0.25
"""Seconds an idle connection stays open at shutdown, so that a request already on its way is answered; and for as long
after the last request that came on any of them: a client that goes on sending takes its idle connections one by one,
and each is told `Connection: close`."""


class HttpServer:
    """Serves one ASGI app on one listening socket, or one `Handler` (then `app` is None), which gets each request as
    this server has it.

    `cancel_on_disconnect` cancels the app's task when its client leaves; otherwise the app learns of it from
    `receive()` (`http.disconnect`) or from `OSError` out of `send()`. `on_refusal` is called with the status of every
    request refused here, `refusal_headers` with such a request's headers (lower-case names, as far as they were read):
    what it returns the answer carries. `screen` sees each request's scope as soon as its headers are there: where it
    says no, the app is called at once, with an empty body, to say why, and what the client sends is not kept. With
    `tls` the port speaks nothing else. A body is `bytes`, or `bytearray` if it came in several pieces. ASGI's lifespan
    protocol is not spoken: whoever starts the server owns what the app needs.
    """

    def __init__(
        self,
        app: ASGIApp | None,
        sock: socket.socket,
        limits: HttpLimits | None = None,
        *,
        cancel_on_disconnect: bool = False,
        on_refusal: Callable[[int], None] = lambda status: None,
        refusal_headers: Callable[[Headers], Headers] = lambda headers: [],
        screen: Callable[[Scope], bool] = lambda scope: True,
        handler: Handler | None = None,
        tls: TlsPort | None = None,
    ) -> None:
        self._sock = sock
        self.port: int = sock.getsockname()[1]
        self._context = ServerContext(
            app,
            limits or HttpLimits(),
            cancel_on_disconnect=cancel_on_disconnect,
            on_refusal=on_refusal,
            refusal_headers=refusal_headers,
            screen=screen,
            handler=handler,
        )
        self._tls = tls
        self._listener: asyncio.Server | None = None
        self._tls_listener: TlsListener | None = None

    @property
    def in_flight(self) -> int:
        """Requests whose headers have arrived and whose answer is not complete."""
        return self._context.in_flight

    @property
    def body_bytes(self) -> int:
        """Bytes of the bodies of the requests in flight."""
        return self._context.body_bytes

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._context.connections)

    @property
    def handshakes(self) -> int:
        """TLS handshakes under way."""
        return self._tls_listener.handshakes if self._tls_listener is not None else 0

    async def start(self) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        if self._tls is not None:
            refusals = {True: None, False: Refusal(400, "This port speaks HTTPS only: use an https:// address.")}
            self._tls_listener = TlsListener(
                self._sock, self._tls, lambda secure: ServerConnection(self._context, loop, refusals[secure])
            )
            return
        self._listener = await loop.create_server(
            lambda: ServerConnection(self._context, loop), sock=self._sock, backlog=BACKLOG
        )

    def drain(self) -> None:
        """Go on accepting, but let every answer begun from now on say `Connection: close`, so that clients move.

        No connection is closed before it has said so, or has been idle for as long as any may be. Safe to call twice.
        """
        self._context.advance(ServerEvent.DRAIN)
        for connection in self._context.connections:
            connection.drain_requests()

    async def stop(self, grace: float) -> None:
        """`drain`, stop accepting, let answers under way finish for up to `grace` seconds, then cut what is left.

        Idle connections are closed without a word, but only when nothing has come on any connection for
        `QUIET_BEFORE_CLOSING`. Safe to call twice.
        """
        context, loop = self._context, asyncio.get_running_loop()
        self.drain()
        context.advance(ServerEvent.STOP)
        if self._listener is not None:
            self._listener.close()
        end = loop.time() + grace
        if self._tls_listener is not None:
            self._tls_listener.close()
            await self._tls_listener.finish(min(HANDSHAKE_GRACE, grace))
        await context.connections.until_closed(min(QUIET_BEFORE_CLOSING, grace))
        while context.connections and (now := loop.time()) < end:
            if context.arrived_at <= (quiet_since := now - QUIET_BEFORE_CLOSING):
                for connection in list(context.connections):
                    connection.close_if_idle(quiet_since)
            await context.connections.until_closed(min(QUIET_BEFORE_CLOSING / 5, end - now))
        for task in list(context.tasks):
            task.cancel("the grace period is over")
        while context.tasks:
            context.task_ended.clear()
            await context.task_ended.wait()
        for connection in list(context.connections):
            connection.abort()
