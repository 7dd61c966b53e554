"""Accepts TLS connections: handshakes are bounded in number and time, and what fails is told apart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from runtime.logs import EventLogger

logger = EventLogger(__name__)

CLIENT_IDENTITY = "kvcluster.client_identity"
"""ASGI extension in the scope of requests over TLS: whom the client's certificate names; empty without one."""
MAX_HANDSHAKES = 512
SHUTDOWN_SECONDS = 2.0
"""Seconds that a client may take to answer the end of its TLS connection."""
_ACCEPT_RETRY = 0.2
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class HandshakeFailure(StrEnum):
    """Why a connection to a TLS port did not become one."""

    PLAIN_HTTP = "plain_http"
    """It spoke HTTP without TLS, and was answered so."""
    PROTOCOL = "protocol"
    """No common version or cipher, or no TLS at all."""
    REFUSED = "refused"
    """The client ended it with an alert: it does not trust the certificate, say."""
    CLIENT_CERTIFICATE = "client_certificate"
    """The client sent none, or one that no accepted authority has signed or that is not valid now."""
    TIMEOUT = "timeout"
    LEFT = "left"
    """The client went in the midst of it."""
    DISPLACED = "displaced"
    """So many others began that this one, then the oldest, had to make room."""


@dataclass(frozen=True, slots=True)
class TlsPort:
    """How a port speaks TLS. `context` is asked at each handshake, so that a certificate can change."""

    context: Callable[[], ssl.SSLContext]
    timeout: float = 10.0
    """Seconds from a connection's acceptance to the end of its handshake."""
    max_handshakes: int = MAX_HANDSHAKES
    """At once. One more takes the place of the oldest: connections that say nothing keep nobody out."""
    on_done: Callable[[str], None] = lambda version: None
    """Called with the version of TLS, such as `TLSv1.3`."""
    on_failure: Callable[[HandshakeFailure], None] = lambda failure: None


class TlsListener:
    """Accepts connections on a listening socket until it is closed.

    `protocol(True)` makes the protocol of a connection whose handshake succeeded, `protocol(False)` of one that speaks
    plain HTTP (of any version), which has to tell it so.
    """

    def __init__(self, sock: socket.socket, port: TlsPort, protocol: Callable[[bool], asyncio.Protocol]) -> None:
        self._sock = sock
        self._port = port
        self._protocol = protocol
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """Those under way, oldest first."""
        self._accepting = asyncio.create_task(self._accept())

    @property
    def handshakes(self) -> int:
        """Handshakes under way."""
        return len(self._handshakes)

    def close(self) -> None:
        """Accept no more. Handshakes under way go on."""
        self._accepting.cancel()

    async def finish(self, seconds: float) -> None:
        """Wait until the handshakes under way are over, for so many seconds at most, and end what is left."""
        await asyncio.wait([self._accepting])
        if self._handshakes:
            await asyncio.wait(list(self._handshakes), timeout=seconds)
        for task in self._handshakes:
            task.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._sock)
                except OSError as error:
                    if error.errno not in _OUT_OF_DESCRIPTORS:
                        continue  # a connection that ended before it was accepted
                    logger.error("accept_failed", why=error.strerror)
                    await asyncio.sleep(_ACCEPT_RETRY)
                    continue
                if len(self._handshakes) >= self._port.max_handshakes:
                    oldest = next(iter(self._handshakes))
                    del self._handshakes[oldest]
                    oldest.cancel()
                    self._port.on_failure(HandshakeFailure.DISPLACED)
                task = loop.create_task(self._shake(sock))
                self._handshakes[task] = None
                task.add_done_callback(self._over)
        finally:
            self._sock.close()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    async def _shake(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._port.timeout):
                failure = await self._connect(sock)
        except TimeoutError:
            failure = HandshakeFailure.TIMEOUT
        except ssl.SSLError as error:
            failure = _reason(error)
        except OSError:
            failure = HandshakeFailure.LEFT
        if failure is not None:
            self._port.on_failure(failure)

    async def _connect(self, sock: socket.socket) -> HandshakeFailure | None:
        """Raises `OSError`, `ssl.SSLError` among them."""
        loop = asyncio.get_running_loop()
        first = b""
        try:
            sock.setblocking(False)
            first = await _first_byte(sock)
        finally:
            if not first:
                sock.close()
        if not first:
            return None  # a load balancer looks whether the port is open: no failure
        if b"A" <= first <= b"Z":
            await loop.connect_accepted_socket(lambda: self._protocol(False), sock)
            return HandshakeFailure.PLAIN_HTTP
        transport, _ = await loop.connect_accepted_socket(
            lambda: self._protocol(True),
            sock,
            ssl=self._port.context(),
            ssl_handshake_timeout=2 * self._port.timeout,
            ssl_shutdown_timeout=SHUTDOWN_SECONDS,
        )
        self._port.on_done(transport.get_extra_info("ssl_object").version())
        return None


async def _first_byte(sock: socket.socket) -> bytes:
    """What comes first, which stays to be read; empty when the client leaves without a word. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(BlockingIOError):
        return sock.recv(1, socket.MSG_PEEK)
    readable = asyncio.Event()
    loop.add_reader(sock.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock.fileno())
    return sock.recv(1, socket.MSG_PEEK)


def identity(certificate: Mapping[str, Any] | None) -> str:
    """Whom a verified certificate (as `SSLObject.getpeercert` gives it) names: the first URI among its alternative
    names (a SPIFFE ID, say), else its common name, else the first of the alternative names; empty for none."""
    if not certificate:
        return ""
    others = certificate.get("subjectAltName", ())
    uris = [value for kind, value in others if kind == "URI"]
    common = [value for names in certificate.get("subject", ()) for kind, value in names if kind == "commonName"]
    return next(iter([*uris, *common, *(value for _, value in others)]), "")


def _reason(error: ssl.SSLError) -> HandshakeFailure:
    if isinstance(error, ssl.SSLCertVerificationError) or error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return HandshakeFailure.CLIENT_CERTIFICATE
    if "_ALERT_" in (error.reason or ""):
        return HandshakeFailure.REFUSED
    return HandshakeFailure.PROTOCOL
