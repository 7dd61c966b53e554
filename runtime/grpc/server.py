"""A gRPC server: its sockets, with TLS or without, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from runtime.grpc.connection import Connection
from runtime.grpc.context import GrpcContext, GrpcLimits, Method
from runtime.sockets import BACKLOG
from runtime.tls import Certificates, KeyPair
from runtime.tls_listener import TlsListener, TlsPort

_TLS_ONLY = "this port speaks TLS only"
HANDSHAKE_GRACE = 1.0
"""Seconds that a TLS handshake under way may take when a server stops."""


class GrpcServer:
    """Serves methods, by path, on listening sockets: `start` takes each with its certificates, or None."""

    def __init__(self, methods: Mapping[str, Method], limits: GrpcLimits | None = None) -> None:
        self._context = GrpcContext({path.encode(): method for path, method in methods.items()}, limits or GrpcLimits())
        self._listeners: list[asyncio.Server] = []
        self._tls_listeners: list[TlsListener] = []

    @property
    def calls(self) -> int:
        """Open calls."""
        return self._context.calls

    @property
    def held(self) -> int:
        """Bytes of messages that have not come whole, or that clients have not read."""
        return self._context.held

    async def start(self, sock: socket.socket, certificates: Certificates | None = None) -> None:
        """Accept connections on one more socket."""
        loop = asyncio.get_running_loop()

        if certificates is not None:
            limits = self._context.limits
            port = TlsPort(_contexts(certificates), limits.handshake, limits.handshakes)
            self._tls_listeners.append(
                TlsListener(sock, port, lambda secure: Connection(self._context, loop, "" if secure else _TLS_ONLY))
            )
            return
        make = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        self._listeners.append(await make(lambda: Connection(self._context, loop), sock=sock, backlog=BACKLOG))

    async def stop(self, grace: float) -> None:
        """Accept no connection and no call, give those that are open so many seconds, then end them."""
        context, loop = self._context, asyncio.get_running_loop()
        for listener in self._listeners:
            listener.close()
        end = loop.time() + grace
        for tls_listener in self._tls_listeners:
            tls_listener.close()
        for connection in list(context.connections):
            connection.leave()
        for tls_listener in self._tls_listeners:
            await tls_listener.finish(min(HANDSHAKE_GRACE, grace))
        for connection in list(context.connections):
            connection.leave()  # those whose handshakes have ended meanwhile
        await context.connections.until_closed(end - loop.time())
        for connection in list(context.connections):
            connection.cut()
        await context.connections.until_closed(0.1)
        for connection in list(context.connections):
            connection.abort()
        context.idle.close()


def _contexts(certificates: Certificates) -> Callable[[], ssl.SSLContext]:
    """What each handshake uses: made anew when the certificate has changed."""
    noted = certificates.current()
    context = _made(noted)

    def current() -> ssl.SSLContext:
        nonlocal noted, context
        pair = certificates.current()
        if pair is not noted:
            with contextlib.suppress(ssl.SSLError, OSError):
                context = _made(pair)
            noted = pair
        return context

    return current


def _made(pair: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    # The ssl module reads files only. Where there are files in memory, none is left on a disk.
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("certificate"), "wb") as file:
            _load(context, pair, file, f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile() as file:
            _load(context, pair, file, file.name)
    return context


def _load(context: ssl.SSLContext, pair: KeyPair, file: Any, name: str) -> None:
    file.write(pair.key + b"\n" + pair.certificate)
    file.flush()
    context.load_cert_chain(name)
