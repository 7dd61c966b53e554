"""What clients of one HTTP server may hold. Bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass

LAME_DUCK = 0.25
"""Seconds an idle connection stays open at shutdown, so that a request already on its way is answered; and for as long
after the last request that came on any of them: a client that goes on sending takes its idle connections one by one,
and each is told `Connection: close`."""
LINGER = 2.0
"""Seconds a refused connection is still read (and thrown away): closing it with unread bytes would reset it, and
the client might never see the answer that says why."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may hold, and (`max_total_body_bytes`, `max_concurrent_requests`) all of them together."""

    max_header_bytes: int = 65_536
    max_headers: int = 256
    max_body_bytes: int = 16 * 2**20
    max_total_body_bytes: int | None = None
    """Bodies of all requests whose answers have not begun; None = no bound but the number of requests."""
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
