"""Sockets for connections that are silent for long: the kernel finds out when the other side is no longer there.

For `aiohttp.TCPConnector(socket_factory=...)`. It sees what no longer carries packets (a machine that is gone, a load
balancer that forgot the connection); a peer whose kernel answers though nobody reads is not found out this way.
"""

from __future__ import annotations

import socket
from typing import Any

IDLE, INTERVAL, PROBES = 5, 3, 3
"""Seconds of silence before the first probe, seconds between two, and how many go unanswered before it is dead."""
UNANSWERED_MS = 1_000 * (IDLE + INTERVAL * PROBES)
"""Milliseconds for which data that was sent may go without an acknowledgement (RFC 5482)."""


def kept_alive(address: tuple[int, int, int, str, Any]) -> socket.socket:
    """An unconnected socket for this entry of `getaddrinfo`, that is dead within `UNANSWERED_MS` of its peer."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": IDLE,
        "TCP_KEEPALIVE": IDLE,  # macOS's name of the same
        "TCP_KEEPINTVL": INTERVAL,
        "TCP_KEEPCNT": PROBES,
        "TCP_USER_TIMEOUT": UNANSWERED_MS,
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
