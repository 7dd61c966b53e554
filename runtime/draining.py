"""The time between SIGTERM and the closed port: how long a process that leaves goes on taking requests.

Others go on sending to it until they know that it leaves; and where it is the only one, until a replacement serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

DRAINING_HEADER = "x-kvcluster-draining"
"""Of a worker's `/health`, beside status 200: it still takes requests, but others should be preferred."""

QUIET = 2.0
"""After so many seconds without a request nobody sends any more."""
POLL = 1.0
"""Seconds between two looks for a replacement."""


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """Seconds."""

    delay: float
    """Requests are taken for so long in any case: others need it to learn that the process leaves."""
    limit: float
    """... and for so long at most while there is no replacement. Less than `delay`: no longer than that."""


class Drain:
    """Waits until a process may stop taking requests.

    `replaced` says whether somebody else serves; None: nobody can tell, and then `last_request` (the time of the last
    one, on `clock`) decides: as long as requests come they have nowhere else to go. An answer that `replaced` fails to
    give (`OSError`) is no answer; after a `PermissionError` nobody can tell any more.
    """

    def __init__(
        self,
        policy: DrainPolicy,
        clock: Callable[[], float],
        *,
        last_request: Callable[[], float],
        replaced: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._last_request = last_request
        self._replaced = replaced

    async def wait(self, cut_short: asyncio.Event) -> None:
        """Return when the time has come, or once `cut_short` is set."""
        begun = self._clock()
        earliest, latest = begun + self._policy.delay, begun + max(self._policy.delay, self._policy.limit)
        replaced, replaced_at = self._replaced, None
        while not cut_short.is_set():
            now = self._clock()
            if replaced is None:
                due = max(earliest, max(self._last_request(), begun) + QUIET)
            else:
                try:
                    found = replaced_at is None and await self._is_replaced(replaced, latest - now)
                except PermissionError:
                    replaced = None
                    continue
                now = self._clock()
                if found:
                    replaced_at = now
                due = replaced_at + self._policy.delay if replaced_at is not None else now + POLL
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
