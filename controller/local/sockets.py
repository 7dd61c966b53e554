"""The listening sockets of a local cluster.

The supervisor binds them and every process inherits its own: a process that is restarted keeps its address, and
connections made meanwhile wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import errno
import socket

LOOPBACK = "127.0.0.1"
BACKLOG = 2048


class PortTakenError(OSError):
    """Another process listens on the port; the message names the port and the flag that chooses another."""


def bind(port: int, flag: str = "", host: str = LOOPBACK) -> socket.socket:
    """A socket that listens on this port (0: any free one). Raises `PortTakenError` or another `OSError`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Lets a port be bound again right after its last use; it does not let two processes share it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        choose = f": choose another with {flag} (0: any free one)" if flag else ""
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(error.errno, f"port {port} on {host} is taken by another process{choose}") from None
        if error.errno == errno.EACCES:
            message = f"port {port} on {host} needs privileges{choose}"
            raise PortTakenError(error.errno, message) from None
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Base URL of what listens here."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"
