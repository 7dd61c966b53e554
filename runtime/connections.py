"""The open connections of a server that is going to end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

C = TypeVar("C")


class OpenConnections(set[C]):
    """A set whose emptiness can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._one_closed = asyncio.Event()

    def closed(self, connection: C) -> None:
        """This one is gone. Safe to call twice."""
        self.discard(connection)
        self._one_closed.set()

    async def until_closed(self, seconds: float) -> None:
        """Wait until there is none, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                while self:
                    self._one_closed.clear()
                    await self._one_closed.wait()
