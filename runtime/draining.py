"""How long a process that was told to stop goes on taking requests: the time between SIGTERM and the closed port.

Clients go on sending requests until they learn that the process stops. Where it is the only one, they have nowhere else
to send them until a replacement serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass

DRAINING_HEADER = "x-kvcluster-draining"
"""Header of a worker's `/health` beside status 200: the worker still takes requests, but others are to be preferred."""

QUIET = 2.0
"""Seconds without a request after which clients are taken to have learned that the process stops."""
POLL = 1.0
"""Seconds between two questions for a replacement."""


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """Seconds."""

    delay: float
    """Requests are taken for this long in any case: clients need it to learn that the process stops."""
    limit: float
    """Requests are taken for at most this long while there is no replacement. A limit below `delay` has no effect."""


@dataclass(eq=False)
class Drain:
    """Waits until a process may stop taking requests.

    `replaced` answers whether another process serves. An `OSError` from it counts as no answer; after a
    `PermissionError` it is not asked again. Without it `last_request` (the time of the last one, on `clock`) decides:
    while requests come, they have nowhere else to go.
    """

    policy: DrainPolicy
    clock: Callable[[], float]
    _: KW_ONLY
    last_request: Callable[[], float]
    replaced: Callable[[], Awaitable[bool]] | None = None

    async def wait(self, cut_short: asyncio.Event) -> None:
        """Return when the time has come, or once `cut_short` is set."""
        begun = self.clock()
        earliest, latest = begun + self.policy.delay, begun + max(self.policy.delay, self.policy.limit)
        replaced, replaced_at = self.replaced, None
        while not cut_short.is_set():
            now = self.clock()
            if replaced is None:
                due = max(earliest, max(self.last_request(), begun) + QUIET)
            else:
                try:
                    found = replaced_at is None and await self._is_replaced(replaced, latest - now)
                except PermissionError:
                    replaced = None
                    continue
                now = self.clock()
                if found:
                    replaced_at = now
                due = replaced_at + self.policy.delay if replaced_at is not None else now + POLL
            due = min(due, latest)
            if now >= due:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - now):
                    await cut_short.wait()

    @staticmethod
    async def _is_replaced(replaced: Callable[[], Awaitable[bool]], seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await replaced()
        except PermissionError:
            raise
        except OSError:
            return False
