"""The work queue: which KVClusters are due to be reconciled, and when. One entry each, however often it is added."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from controller.reconcile.inventory import Key
from runtime.backoff import Backoff
from runtime.logs import EventLogger

logger = EventLogger(__name__)

BACKOFF = Backoff(0.5, 60.0)


class KeyState(Enum):
    """Where a key is between two calls of the handler."""

    IDLE = auto()
    """Nothing is to be done. Such an entry is not kept."""
    WAITING = auto()
    """It is handled once it is due and a worker is free."""
    RUNNING = auto()
    """The handler runs."""
    RUNNING_AND_DUE = auto()
    """The handler runs, and the key was added again meanwhile."""


class KeyEvent(Enum):
    """What happens to a key."""

    ADDED = auto()
    STARTED = auto()
    ENDED = auto()


KEY_TRANSITIONS: Mapping[tuple[KeyState, KeyEvent], KeyState] = {
    (KeyState.IDLE, KeyEvent.ADDED): KeyState.WAITING,
    (KeyState.WAITING, KeyEvent.ADDED): KeyState.WAITING,
    (KeyState.WAITING, KeyEvent.STARTED): KeyState.RUNNING,
    (KeyState.RUNNING, KeyEvent.ADDED): KeyState.RUNNING_AND_DUE,
    (KeyState.RUNNING, KeyEvent.ENDED): KeyState.IDLE,
    (KeyState.RUNNING_AND_DUE, KeyEvent.ADDED): KeyState.RUNNING_AND_DUE,
    (KeyState.RUNNING_AND_DUE, KeyEvent.ENDED): KeyState.WAITING,
}


class RetryLater(Exception):
    """Raised by a handler that could not finish. `after`: seconds to wait at least, where the server named them.

    `progress`: the handler got further than before, so the back-off starts anew. `logged`: the cause is logged already.
    """

    def __init__(self, why: str, after: float | None = None, *, progress: bool = False, logged: bool = False) -> None:
        super().__init__(why)
        self.after = after
        self.progress = progress
        self.logged = logged


@dataclass(slots=True)
class _Entry:
    state: KeyState = KeyState.IDLE
    due: float = math.inf
    """When the next call is due, in the loop's time; infinite while none is asked for."""
    failures: int = 0
    """In a row."""

    def advance(self, event: KeyEvent) -> None:
        """Enters the state that follows. Raises `KeyError` for an event that cannot happen in this state."""
        self.state = KEY_TRANSITIONS[self.state, event]


class WorkQueue:
    """Calls `handler(key)` for each key when it is due, the earliest first, at most `workers` at once.

    A key is never handled twice at the same time: when it is added while it is handled, it is handled again
    afterwards. The handler returns the seconds after which it wants to be called again, or None.
    """

    def __init__(self, handler: Callable[[Key], Awaitable[float | None]], *, workers: int, rng: random.Random) -> None:
        self._handler = handler
        self._workers = workers
        self._rng = rng
        self._entries: dict[Key, _Entry] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """How many keys wait for a call."""
        return sum(entry.due < math.inf for entry in self._entries.values())

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Handle this key in `delay` seconds, or earlier if that was asked for before."""
        due = asyncio.get_running_loop().time() + delay
        entry = self._entries.setdefault(key, _Entry())
        if due < entry.due:
            entry.due = due
            entry.advance(KeyEvent.ADDED)
            self._changed.set()

    async def run(self) -> None:
        """Handles what is due, until cancelled."""
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
        waiting = [item for item in self._entries.items() if item[1].state is KeyState.WAITING]
        for key, entry in sorted(waiting, key=lambda item: item[1].due):
            if len(running) >= self._workers:
                return None
            if entry.due > now:
                return entry.due - now
            entry.due = math.inf
            entry.advance(KeyEvent.STARTED)
            task = asyncio.create_task(self._handle(key, entry))
            running.add(task)
            task.add_done_callback(functools.partial(self._ended, key, entry, running))
        return None

    def _ended(self, key: Key, entry: _Entry, running: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        running.discard(task)
        entry.advance(KeyEvent.ENDED)
        if entry.state is KeyState.IDLE:
            del self._entries[key]
        self._changed.set()

    async def _handle(self, key: Key, entry: _Entry) -> None:
        try:
            again = await self._handler(key)
        except RetryLater as error:
            entry.failures = 1 if error.progress else entry.failures + 1
            delay = max(BACKOFF.delay(entry.failures, self._rng.random()), error.after or 0.0)
            level = logging.DEBUG if error.logged else logging.WARNING
            logger.log(level, "reconcile_retry", cluster="/".join(key), after=delay, why=str(error))
            self.add(key, delay)
        except Exception:  # whatever one cluster causes, the others go on
            entry.failures += 1
            logger.exception("reconcile_failed", cluster="/".join(key))
            self.add(key, BACKOFF.delay(entry.failures, self._rng.random()))
        else:
            entry.failures = 0
            if again is not None:
                self.add(key, again)
