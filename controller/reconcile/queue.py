"""Which clusters are to be looked at, and when: one entry a cluster however often it is named."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Awaitable, Callable

from controller.reconcile.inventory import Key
from runtime.backoff import Backoff
from runtime.logs import event

logger = logging.getLogger(__name__)

BACKOFF = Backoff(0.5, 60.0)


class RetryLater(Exception):
    """Raised by a handler that could not finish; `after` seconds at least, where the server said so.

    `progress`: it got further than before, so the time between tries begins anew. `said`: the log says why already.
    """

    def __init__(self, why: str, after: float | None = None, *, progress: bool = False, said: bool = False) -> None:
        super().__init__(why)
        self.after = after
        self.progress = progress
        self.said = said


class WorkQueue:
    """Keys that wait for their turn, each at most once, earliest first. A key that is being handled is not handled a
    second time at once: it waits until the first is done.

    `handler(key)` answers after how many seconds it wants to be called again, None: not by itself.
    """

    def __init__(self, handler: Callable[[Key], Awaitable[float | None]], *, workers: int, rng: random.Random) -> None:
        self._handler = handler
        self._workers = workers
        self._rng = rng
        self._due: dict[Key, float] = {}
        self._busy: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Handle this key in `delay` seconds, or earlier if that was asked for before."""
        due = asyncio.get_running_loop().time() + delay
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._changed.set()

    async def run(self) -> None:
        """Handle what is due, until cancelled."""
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._changed.clear()
                wait = self._start_due(running)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _start_due(self, running: set[asyncio.Task[None]]) -> float | None:
        """Seconds until the next key is due; None when there is none to wait for."""
        now = asyncio.get_running_loop().time()
        for key, due in sorted(self._due.items(), key=lambda entry: entry[1]):
            if key in self._busy:
                continue
            if len(running) >= self._workers:
                return None
            if due > now:
                return due - now
            del self._due[key]
            self._busy.add(key)
            task = asyncio.create_task(self._handle(key))
            running.add(task)
            task.add_done_callback(functools.partial(self._done, key, running))
        return None

    def _done(self, key: Key, running: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        running.discard(task)
        self._busy.discard(key)
        self._changed.set()

    async def _handle(self, key: Key) -> None:
        try:
            again = await self._handler(key)
        except RetryLater as error:
            failures = self._failures[key] = 1 if error.progress else self._failures.get(key, 0) + 1
            delay = max(BACKOFF.delay(failures, self._rng.random()), error.after or 0.0)
            level = logging.DEBUG if error.said else logging.WARNING
            event(logger, level, "reconcile_again", cluster="/".join(key), after=delay, why=str(error))
            self.add(key, delay)
        except Exception:  # whatever one cluster causes, the others go on
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            logger.exception("reconcile_failed", extra={"kvcluster_fields": {"cluster": "/".join(key)}})
            self.add(key, BACKOFF.delay(failures, self._rng.random()))
        else:
            self._failures.pop(key, None)
            if again is not None:
                self.add(key, again)
