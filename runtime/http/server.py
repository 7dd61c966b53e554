"""Bounded HTTP/1.1 serving of an ASGI app: what worker and router put between the network and their handlers.

Every resource a client can hold has a bound (`HttpLimits`). The app is called once the whole request has arrived: a
slow or oversized upload costs no task, and the app's first `receive()` returns the complete body. What breaks a bound
is answered here, in the error shape of OpenAI and vLLM, and the connection is closed.

uvicorn was rejected: its `Server` wakes ten times a second when idle, and at shutdown it drops idle keep-alive
connections while a client may be writing its next request to one; its protocol bounds nothing, and is no public API.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
from collections.abc import Awaitable, Callable

import uvloop
from starlette.types import ASGIApp

from runtime.http.connection import Connection
from runtime.http.limits import LAME_DUCK, HttpLimits
from runtime.http.request import AnswerCut
from runtime.http.serving import Headers, ServingState

__all__ = ["AnswerCut", "HttpLimits", "HttpServer", "inherited", "listen", "run"]

BACKLOG = 2048
EVERYWHERE, EVERYWHERE_IPV4 = "::", "0.0.0.0"  # noqa: S104  a pod is reached from outside


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. `::` is every address of the machine, of IPv4 too, and of IPv4
    alone where there is no IPv6. Raises `OSError`."""
    sock = _everywhere(port) if host == EVERYWHERE else _listening(host, port)
    sock.setblocking(False)
    return sock


def _listening(host: str, port: int, *, both: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)


def _everywhere(port: int) -> socket.socket:
    if not socket.has_dualstack_ipv6():
        return _listening(EVERYWHERE_IPV4, port)
    try:
        return _listening(EVERYWHERE, port, both=True)
    except OSError as error:
        # A kernel that knows IPv6, on a machine or in a pod where it is switched off.
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return _listening(EVERYWHERE_IPV4, port)


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


class HttpServer:
    """Serves one ASGI app on one listening socket.

    `cancel_on_disconnect` cancels the app's task when its client leaves; otherwise the app learns of it from
    `receive()` (`http.disconnect`) or from `OSError` out of `send()`. `on_refusal` is called with the status of every
    request refused here, `refusal_headers` with such a request's headers (lower-case names, as far as they were read):
    what it returns the answer carries. A body is `bytes`, or `bytearray` if it came in several pieces. ASGI's lifespan
    protocol is not spoken: whoever starts the server owns what the app needs.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        limits: HttpLimits | None = None,
        *,
        cancel_on_disconnect: bool = False,
        on_refusal: Callable[[int], None] = lambda status: None,
        refusal_headers: Callable[[Headers], Headers] = lambda headers: [],
    ) -> None:
        self._sock = sock
        self.port: int = sock.getsockname()[1]
        self._state = ServingState(
            app,
            limits or HttpLimits(),
            cancel_on_disconnect=cancel_on_disconnect,
            on_refusal=on_refusal,
            refusal_headers=refusal_headers,
        )
        self._listener: asyncio.Server | None = None

    @property
    def in_flight(self) -> int:
        """Requests whose headers have arrived and whose answer is not complete."""
        return self._state.in_flight

    @property
    def body_bytes(self) -> int:
        """Bytes of the bodies of the requests in flight."""
        return self._state.body_bytes

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._state.connections)

    async def start(self) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self._state, loop), sock=self._sock, backlog=BACKLOG
        )

    def drain(self) -> None:
        """Go on accepting, but let every answer begun from now on say `Connection: close`, so that clients move.

        No connection is closed before it has said so, or has been idle for as long as any may be. Safe to call twice.
        """
        self._state.draining = True
        for connection in self._state.connections:
            connection.drain_requests()

    async def stop(self, grace: float) -> None:
        """`drain`, stop accepting, let answers under way finish for up to `grace` seconds, then cut what is left.

        Idle connections are closed without a word, but only when nothing has come on any of them for `LAME_DUCK`.
        Safe to call twice.
        """
        state, loop = self._state, asyncio.get_running_loop()
        self.drain()
        state.stopping = True
        if self._listener is not None:
            self._listener.close()
        end = loop.time() + grace
        await self._until_closed(min(LAME_DUCK, grace))
        while state.connections and (now := loop.time()) < end:
            if state.arrived_at <= (quiet_since := now - LAME_DUCK):
                for connection in list(state.connections):
                    connection.close_if_idle(quiet_since)
            await self._until_closed(min(LAME_DUCK / 5, end - now))
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel("the grace period is over")
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(state.connections):
            connection.abort()

    async def _until_closed(self, seconds: float) -> None:
        state = self._state
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                while state.connections:
                    state.changed.clear()
                    await state.changed.wait()


def settle() -> None:
    """Call once, when a process has made all it keeps: the garbage collector does not walk that again.

    A full collection of what a process imports takes some ten milliseconds, in which no request moves.
    """
    gc.collect()
    gc.freeze()


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main` on uvloop and return its exit code. Its event is set at SIGTERM or SIGINT; one that comes while it is
    set cancels `main`."""

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
