"""Runs the engine in real time. The engine computes when its steps end; this module wakes it up at those times.

At most one timer is armed, for the end of the step in progress; an idle engine has none. Outputs go to the handler of
their request, changes of the cache and the load to `publish`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcache.feed import HeldElsewhere, Load
from kvcache.keys import BlockKey
from runtime.logs import EventLogger
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import CacheEvent
from worker.emulator.engine.request import EngineRequest, FinishedRequest, FinishReason, Output
from worker.emulator.timer import LoopTimer, TimerFactory

logger = EventLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine raised an exception, which is a bug. This process can generate nothing more."""


class OutputHandler(Protocol):
    """Receives the outputs of one engine request. Called in the event loop; must not block."""

    def on_output(self, output: Output) -> None: ...

    def on_abort(self) -> None:
        """The worker aborted the request: no output follows."""

    def on_engine_dead(self, error: EngineDeadError) -> None:
        """The engine is dead: no output follows."""


class Observer(Protocol):
    """What the metrics observe of the engine's work."""

    def token(self, gap: float | None) -> None:
        """A token was generated, `gap` seconds after the one before it (None for a request's first)."""

    def finished(self, request: FinishedRequest) -> None: ...


class _Running:
    __slots__ = ("handler", "last_at")

    def __init__(self, handler: OutputHandler) -> None:
        self.handler = handler
        self.last_at: float | None = None


class AsyncEngine:
    """Owner of one engine. `clock` gives seconds of any monotonic origin; `publish` gets every change of cache and
    load."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float],
        publish: Callable[[Sequence[CacheEvent], Load], None],
        observer: Observer,
        timer: TimerFactory = LoopTimer,
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._publish = publish
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, _Running] = {}
        self._timer = timer(self._loop, self._wake_up)
        self._scheduled: asyncio.Handle | None = None
        self.dead = asyncio.Event()
        """Set once the engine has failed. The process should then end."""

    @property
    def armed(self) -> bool:
        """Whether the timer is set. It is not while the engine is idle."""
        return self._timer.armed

    @property
    def active(self) -> int:
        """Number of requests that the engine has not finished."""
        return len(self._running)

    def submit(self, request: EngineRequest, handler: OutputHandler) -> None:
        """Queue a request. Raises `EngineDeadError`."""
        if self.dead.is_set():
            raise EngineDeadError
        self.engine.submit(request, self._clock())
        self._running[request.request_id] = _Running(handler)
        self._schedule_advance()

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request and release its blocks. Its handler is not called any more. Idempotent."""
        if self._running.pop(request_id, None) is None or self.dead.is_set():
            return
        self.engine.abort(request_id, self._clock(), reason)
        self._schedule_advance()

    def abort_all(self) -> None:
        """Abort every request and tell its handler."""
        for request_id, running in tuple(self._running.items()):
            self.abort(request_id)
            running.handler.on_abort()

    def reset_prefix_cache(self) -> bool:
        """Drop every cached block. False, with nothing done, while a request runs."""
        done = self.engine.reset_prefix_cache()
        self._schedule_advance()
        return done

    def close(self) -> None:
        """Close the timer."""
        self._timer.close()

    def load(self) -> Load:
        """The engine's present load."""
        return self.engine.load()

    def blocks(self) -> list[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every cached block, parents first."""
        return self.engine.blocks()

    def elsewhere(self) -> tuple[HeldElsewhere, ...]:
        """The blocks outside the GPU."""
        return self.engine.elsewhere()

    def flush(self) -> None:
        """Publish every change up to now, so that a snapshot taken next agrees with the feed's position."""
        self._publish(self.engine.take_events(), self.engine.load())

    def _schedule_advance(self) -> None:
        # Once for all requests of one turn of the event loop, so that they may share the engine's next step.
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._wake_up)

    def _wake_up(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        if self.dead.is_set():
            return
        try:
            self._advance()
        except Exception:  # a bug in the engine: clients must not wait for ever
            logger.exception("engine_dead")
            self.die()

    def _advance(self) -> None:
        for output in self.engine.advance(self._clock()):
            self._deliver(output)
        for finished in self.engine.take_finished():
            self._observer.finished(finished)
        self.flush()
        due = self.engine.next_event()
        if due is None:
            self._timer.cancel()
        else:
            self._timer.set(max(due - self._clock(), 0.0))

    def _deliver(self, output: Output) -> None:
        running = self._running.get(output.request_id)
        if running is None:
            return  # aborted during its step
        last_at, running.last_at = running.last_at, output.at
        self._observer.token(None if last_at is None else output.at - last_at)
        if output.finish_reason is not None:
            del self._running[output.request_id]
        running.handler.on_output(output)

    def die(self) -> None:
        """The engine, or another of the same process, has failed: tell every handler."""
        self.dead.set()
        running, self._running = self._running, {}
        for entry in running.values():
            entry.handler.on_engine_dead(EngineDeadError())
