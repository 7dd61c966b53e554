"""One data-parallel rank of an emulated worker: an engine, what observes it, and what publishes its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvcache.feed import AdaptersChanged, Load, WorkerInfo
from worker.emulator.async_engine import AsyncEngine
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import CacheEvent, feed_events
from worker.emulator.metrics import EngineMetrics
from worker.emulator.timer import LoopTimer, TimerFactory
from worker.feed.endpoints import CacheState, FeedEndpoints
from worker.feed.log import FeedLog
from worker.feed.publisher import FeedPublisher

if TYPE_CHECKING:
    from worker.emulator.kv_events.publisher import KVEventsPublisher


class Rank:
    """One engine of a process. `info` says which rank it is; `kv_events` publishes vLLM's own events, if any does. Must
    be made inside the event loop."""

    def __init__(
        self,
        info: WorkerInfo,
        engine: Engine,
        kv_events: KVEventsPublisher | None = None,
        *,
        clock: Callable[[], float],
        timer: TimerFactory = LoopTimer,
    ) -> None:
        self.engine = engine
        self.kv_events = kv_events
        self.metrics = EngineMetrics(info.max_model_len)
        self.feed = FeedLog(info.epoch, engine.load())
        self.publisher = FeedPublisher(self.feed, clock)
        self.async_engine = AsyncEngine(engine, clock=clock, publish=self._publish, observer=self.metrics, timer=timer)
        self.state = CacheState(info, self.async_engine, self.feed)
        self.endpoints = FeedEndpoints(self.state, self.feed, self.publisher)

    def adapters_changed(self, names: tuple[str, ...], missing: Mapping[str, str]) -> None:
        """Tell the routers which adapters are loaded, and why others are not."""
        self.state.info = replace(self.state.info, adapters=names, missing_adapters=missing)
        self.publisher.publish((AdaptersChanged(names, missing),), self.engine.load())

    def close(self) -> None:
        """Stop the timers and close the sockets."""
        self.async_engine.close()
        self.publisher.close()
        if self.kv_events is not None:
            self.kv_events.close()

    def _publish(self, events: Sequence[CacheEvent], load: Load) -> None:
        self.publisher.publish(feed_events(events), load)
        if self.kv_events is not None:
            self.kv_events.take(events, self.engine.stats.steps, self.engine.steps_ended)
