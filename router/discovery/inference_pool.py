"""Workers from an InferencePool of the Gateway API Inference Extension, and the priorities of its InferenceObjectives.

Imported only where Kubernetes is the source of workers, as `router.discovery.kubernetes` is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorkers
from router.discovery.list_state import WatchedList
from router.discovery.objectives import OBJECTIVES_POLICY, ObjectiveWatch
from router.discovery.pool_api import PoolApi, Resource
from router.discovery.pool_objects import Pod, Pool, pool_workers, read_pod, read_pool
from router.discovery.sources import DiscoveryStatus
from runtime.backoff import Backoff
from runtime.kube.listwatch import Key, ListWatch, ListWatchPolicy
from runtime.kube.reflector import Reflector
from runtime.logs import EventLogger

logger = EventLogger(__name__)
T = TypeVar("T")

POOLS_POLICY = ListWatchPolicy(retry=Backoff(0.2, 10.0))


@dataclass(eq=False)
class InferencePoolDiscovery:
    """Follows a pool, its pods and its objectives for ever. Owns the connection to the API server.

    While the pool's selector changes, the pods of the old one count until those of the new one are listed, so that a
    worker that stays is never away. A pool that is deleted has no workers. `priorities` are those of the pool's
    objectives, by name, kept up to date in place. `clock` in seconds.
    """

    api: PoolApi
    priorities: dict[str, int] = field(default_factory=dict)
    _: KW_ONLY
    policy: ListWatchPolicy = POOLS_POLICY
    objectives_policy: ListWatchPolicy = OBJECTIVES_POLICY
    chance: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    _pools: Reflector[Pool] = field(init=False)
    _pods: Reflector[Pod] | None = field(default=None, init=False)
    """Those of `_selector`."""
    _selector: str = field(default="", init=False)
    _following_pods: asyncio.Task[None] | None = field(default=None, init=False)
    _pool: Pool | None = field(default=None, init=False)
    """None: there is no such pool, or it is not known yet."""
    _found: Mapping[Key, Pod] | None = field(default=None, init=False)
    """The pods as last listed, of this selector or of the one before; None: none were listed."""
    _objectives: ObjectiveWatch = field(init=False)
    _workers: DiscoveredWorkers | None = field(default=None, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _earlier: Counter[str] = field(default_factory=Counter, init=False)
    """Failures of the lists of pods by earlier selectors."""
    _earlier_relists: Counter[str] = field(default_factory=Counter, init=False)
    _list: WatchedList = field(init=False)

    def __post_init__(self) -> None:
        self._where = {"pool": self.api.pool, "namespace": self.api.namespace}
        self._list = WatchedList(self._where, self.clock)
        self._pools = self._reflector(self.api.pools(), read_pool)
        self._objectives = ObjectiveWatch(
            self.api, self.priorities, policy=self.objectives_policy, chance=self.chance, clock=self.clock
        )

    def status(self) -> DiscoveryStatus:
        states: list[ListWatch[Any]] = [self._pools.state]
        if self._pods is not None:
            states.append(self._pods.state)
        now = self.clock()
        ages = [state.age(now) for state in states]
        failures, relists = Counter(self._earlier), Counter(self._earlier_relists)
        for state in states:
            failures.update(state.failures)
            relists.update(state.relists)
        absent = self._pools.state.objects is not None and self._pool is None
        errors = [str(state.failure) for state in states if state.failure is not None]
        if absent:
            errors.append(f"waits for InferencePool {self.api.pool}: there is none in namespace {self.api.namespace}")
        return DiscoveryStatus(
            "inference-pool",
            known=self._workers is not None,
            healthy=not absent and all(state.healthy(now) for state in states),
            age=None if None in ages else max(age for age in ages if age is not None),
            error="; ".join(dict.fromkeys(errors)),
            failures=failures,
            relists=relists,
        )

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The workers, again whenever they change. Ends only with its task."""
        tasks = [
            self._start(self._follow_pool(), "pool"),
            self._start(self._objectives.run(), "objectives"),
        ]
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for task in [*tasks, *([self._following_pods] if self._following_pods is not None else [])]:
                    if task.done() and not task.cancelled():
                        task.result()  # it ends with an exception, if at all
                workers = self._current()
                if workers is not None and workers != self._workers:
                    self._log(workers)
                    self._workers = workers
                    yield workers
        finally:
            running = [*tasks, *([self._following_pods] if self._following_pods is not None else [])]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self.api.close()

    def _current(self) -> DiscoveredWorkers | None:
        if self._pool is not None:
            return None if self._found is None else pool_workers(self._pool, self._found.values())
        return {} if self._workers is not None else None

    def _start(self, following: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(following, name=name)
        task.add_done_callback(lambda _: self._changed.set())
        return task

    async def _follow_pool(self) -> None:
        async with contextlib.aclosing(self._pools.follow()) as following:
            async for pools in following:
                before = self._pool
                self._pool = pools.get((self.api.namespace, self.api.pool))
                if self._pool is None and (before is not None or self._workers is None):
                    logger.warning("inference_pool_absent", **self._where, why="waits for it")
                self._objectives.pool_labelled(self._pool.own_labels if self._pool is not None else None)
                await self._select(self._pool.selector if self._pool is not None else "")
                self._changed.set()

    async def _select(self, selector: str) -> None:
        """Follow the pods with these labels; none if it is empty."""
        if selector == self._selector:
            return
        if self._following_pods is not None:
            self._following_pods.cancel()
            await asyncio.gather(self._following_pods, return_exceptions=True)
        if self._pods is not None:
            self._earlier.update(self._pods.state.failures)
            self._earlier_relists.update(self._pods.state.relists)
        self._selector, self._pods, self._following_pods = selector, None, None
        if not selector:
            self._found = None
            return
        self._pods = self._reflector(self.api.pods(selector), read_pod)
        self._following_pods = self._start(self._follow_pods(self._pods), "pods")

    async def _follow_pods(self, reflector: Reflector[Pod]) -> None:
        async with contextlib.aclosing(reflector.follow()) as following:
            async for pods in following:
                self._found = pods
                self._changed.set()

    def _reflector(self, resource: Resource, read: Callable[[Mapping[str, Any]], T]) -> Reflector[T]:
        reflector: Reflector[T] = Reflector(
            resource,
            read,
            policy=self.policy,
            chance=self.chance,
            clock=self.clock,
            on_failure=lambda failure: self._list.failed(
                failure, reflector.state, None if self._workers is None else len(self._workers)
            ),
            on_settled=self._list.settled,
        )
        return reflector

    def _log(self, workers: DiscoveredWorkers) -> None:
        serving = sum(worker.intake is Intake.OPEN for worker in workers.values())
        if self._workers is None:
            logger.info("workers_listed", workers=len(workers), serving=serving, **self._where)
        if not workers and self._pool is not None:
            why = f"no pod with an address has the pool's labels: {self._pool.selector}"
            logger.warning("no_workers_listed", why=why, **self._where)
