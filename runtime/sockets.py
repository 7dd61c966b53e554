"""TCP sockets: those that a server listens on, and those of connections that are silent for long."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

BACKLOG = 2048
EVERYWHERE, EVERYWHERE_IPV4 = "::", "0.0.0.0"  # noqa: S104  a pod is reached from outside

KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 5, 3, 3
"""Seconds of silence before the first probe, seconds between two, and how many go unanswered before it is dead."""
UNANSWERED_MS = 1_000 * (KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES)
"""Milliseconds for which data that was sent may go without an acknowledgement (RFC 5482)."""


class PortTakenError(OSError):
    """Another process listens on the port, or the port needs privileges; the message names the port and the flag that
    chooses another."""


def listen(host: str, port: int, flag: str = "") -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. `::` is every address of the machine, of IPv4 too, and of IPv4
    alone where there is no IPv6. `flag` is the command-line flag that chooses the port. Raises `PortTakenError` or
    another `OSError`."""
    with _named(host, port, flag):
        sock = _everywhere(port) if host == EVERYWHERE else _listening(host, port)
    sock.setblocking(False)
    return sock


def reserve(host: str, port: int, flag: str = "") -> socket.socket:
    """A TCP socket that is bound and does not listen; port 0 takes a free one. It keeps its port for another program of
    this user that listens there with SO_REUSEPORT, also while that program restarts: nobody else gets the port, and
    connections are refused until the program listens. Linux; elsewhere the socket reserves nothing. Raises what
    `listen` raises."""
    # Two sockets with SO_REUSEPORT share a port, and connections: only one without finds out that it is taken.
    with listen(host, port, flag) as free:
        port = free.getsockname()[1]
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with _named(host, port, flag):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for connections of an earlier server in TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    # A server that asks for the port may have SO_REUSEADDR, too: with it here the kernel would let both have it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return sock


@contextlib.contextmanager
def _named(host: str, port: int, flag: str) -> Iterator[None]:
    """An error of `bind` names the port."""
    try:
        yield
    except OSError as error:
        choose = f": choose another with {flag} (0: any free one)" if flag else ""
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(error.errno, f"port {port} on {host} is taken by another process{choose}") from None
        if error.errno == errno.EACCES:
            raise PortTakenError(error.errno, f"port {port} on {host} needs privileges{choose}") from None
        raise


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


def url_of(listener: socket.socket) -> str:
    """Base URL of a server that listens on this socket, of IPv4."""
    host, port = listener.getsockname()
    return f"http://{host}:{port}"


def kept_alive(address: tuple[int, int, int, str, Any]) -> socket.socket:
    """An unconnected socket for this entry of `getaddrinfo`, whose connection fails within `UNANSWERED_MS` once the
    other side is gone. For `aiohttp.TCPConnector(socket_factory=...)`.

    The kernel finds out what no longer carries packets (a machine that is gone, a load balancer that forgot the
    connection). It does not find out that nobody reads where the other side's kernel still answers.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": KEEPALIVE_IDLE,
        "TCP_KEEPALIVE": KEEPALIVE_IDLE,  # macOS's name of the same
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL,
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": UNANSWERED_MS,
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
