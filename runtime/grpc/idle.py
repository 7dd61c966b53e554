"""The connections of a gRPC server that have no call: the longest idle end, and make room for others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.grpc.connection import Connection

_TIMER_SLACK = 0.002
"""Seconds: uvloop's timers count milliseconds, and may fire that much early."""


class IdleConnections:
    """Those of one server, with one timer for all: a call that begins or ends costs none."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: for which a connection may be idle."""
        self._seconds = seconds
        self._since: dict[Connection, float] = {}
        """Loop time since when each is idle, longest first."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """It has no call from now on."""
        self._since[connection] = now = loop.time()
        if self._timer is None:
            self._timer = loop.call_at(now + self._seconds, self._due, loop)

    def discard(self, connection: Connection) -> None:
        """It has a call, or is gone."""
        self._since.pop(connection, None)

    def oldest(self) -> Connection | None:
        """The longest idle."""
        return next(iter(self._since), None)

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        latest = now - self._seconds + _TIMER_SLACK
        for connection in [each for each, since in self._since.items() if since <= latest]:
            del self._since[connection]
            self._since[connection] = now  # it has as long to end by itself
            connection.retire()
        if (first := self.oldest()) is not None:
            self._timer = loop.call_at(self._since[first] + self._seconds, self._due, loop)
