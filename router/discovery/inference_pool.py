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
from pathlib import Path
from typing import Any, TypeVar

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorkers
from router.discovery.kubernetes import ANSWER_TIMEOUT
from router.discovery.list_state import WatchedList
from router.discovery.pool_objects import (
    Objective,
    Pod,
    Pool,
    pool_workers,
    priorities_of,
    read_objective,
    read_pod,
    read_pool,
)
from router.discovery.sources import DiscoveryStatus
from runtime.backoff import Backoff
from runtime.kube.client import ApiServer, parse_json
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError, NoClusterError
from runtime.kube.listwatch import Key, ListWatch, ListWatchPolicy, Watch
from runtime.kube.reflector import EventStream, Reflector
from runtime.logs import EventLogger
from runtime.settings import SettingsError

logger = EventLogger(__name__)
T = TypeVar("T")

POOLS = "inference.networking.k8s.io/v1"
OBJECTIVES = ("inference.networking.x-k8s.io/v1alpha2", "llm-d.ai/v1alpha2")
"""Where InferenceObjectives may be, the older group first: of two with one name the newer group's counts."""
OBJECTIVES_POLICY = ListWatchPolicy(retry=Backoff(15.0, 60.0))
"""Objectives are optional: a kind that the API server does not know is asked for again after half a minute or so."""
POOLS_POLICY = ListWatchPolicy(retry=Backoff(0.2, 10.0))


class Resource:
    """One collection of a namespace at an API server that somebody else owns. Implements `Collection`.

    `query` selects of it. `what` names the resource and its group where a right is missing.
    """

    def __init__(self, server: ApiServer, path: str, query: Mapping[str, str], what: str) -> None:
        self._server = server
        self._path = path
        self._query = query
        self._what = what

    async def list(self) -> object:
        """The answer to a list. Raises `KubeApiError`."""
        try:
            return parse_json(await self._server.request("GET", self._path, self._query))
        except KubeApiError as error:
            raise self._explained(error) from None

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        """Open a watch that fails if it outlasts its time by `slack` seconds. Raises `KubeApiError`."""
        try:
            return await self._server.watch(self._path, watch, slack, self._query)
        except KubeApiError as error:
            raise self._explained(error) from None

    async def close(self) -> None:
        """Nothing: the connections are the owner's."""

    def _explained(self, error: KubeApiError) -> KubeApiError:
        if error.cause is ApiFailureCause.FORBIDDEN:
            return KubeApiError(error.status, error.reason, f"{error.message}; grant list and watch on {self._what}")
        if error.status == 404:
            return KubeApiError(404, error.reason, f"the API server has no {self._what}: install its CRD")
        return error


class PoolApi:
    """An InferencePool's namespace at an API server that this owns."""

    def __init__(self, server: ApiServer, namespace: str, pool: str) -> None:
        self.namespace = namespace
        self.pool = pool
        self._server = server

    def pools(self) -> Resource:
        """The pool itself, as a collection of one at most."""
        return self._resource(POOLS, "inferencepools", {"fieldSelector": f"metadata.name={self.pool}"})

    def pods(self, selector: str) -> Resource:
        """The pods with these labels."""
        return self._resource("v1", "pods", {"labelSelector": selector})

    def objectives(self, api: str) -> Resource:
        """The InferenceObjectives of one group."""
        return self._resource(api, "inferenceobjectives", {})

    def _resource(self, api: str, plural: str, query: Mapping[str, str]) -> Resource:
        base = f"/apis/{api}" if "/" in api else f"/api/{api}"
        group = api.rpartition("/")[0]
        what = f"{plural} ({group})" if group else plural
        path = f"{base}/namespaces/{self.namespace}/{plural}"
        return Resource(self._server, path, query, f"{what} in namespace {self.namespace}")

    async def close(self) -> None:
        """Cut every connection."""
        await self._server.close()


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
    _objectives: dict[str, Mapping[Key, Objective]] = field(default_factory=dict, init=False)
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
            *(self._start(self._follow_objectives(group), group) for group in OBJECTIVES),
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

    async def _follow_objectives(self, api: str) -> None:
        reflector: Reflector[Objective] = Reflector(
            self.api.objectives(api),
            read_objective,
            policy=self.objectives_policy,
            chance=self.chance,
            clock=self.clock,
            on_failure=lambda failure: self._objectives_failed(api, failure, reflector.state.streak),
            on_settled=lambda: None,
        )
        async with contextlib.aclosing(reflector.follow()) as following:
            async for objectives in following:
                self._objectives[api] = objectives
                self._merge_objectives()

    def _objectives_failed(self, api: str, failure: KubeApiError, streak: int) -> None:
        if failure.status == 404:
            # The CRD is not installed, or no longer; the next list finds it.
            if self._objectives.pop(api, None) is not None:
                self._merge_objectives()
        elif streak == 1 and failure.cause not in (ApiFailureCause.CUT, ApiFailureCause.EXPIRED):
            logger.warning("objectives_unknown", group=api, cause=failure.cause.value, why=str(failure))

    def _merge_objectives(self) -> None:
        merged: dict[str, int] = {}
        for api in OBJECTIVES:
            named = ((key[1], each) for key, each in self._objectives.get(api, {}).items())
            merged |= priorities_of(self.api.pool, named)
        for name in self.priorities.keys() - merged.keys():
            del self.priorities[name]
        self.priorities.update(merged)

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


async def find_pool(pool: str, namespace: str | None, kubeconfig: Path | None) -> PoolApi:
    """This pool at the API server that the kubeconfig, the pod or the user's own kubeconfig names; `namespace` None:
    that of the pod or of the kubeconfig's context. Raises `SettingsError`. To be called inside the event loop."""
    try:
        credentials = await find_credentials(kubeconfig, flag="--kubernetes-kubeconfig")
    except NoClusterError as error:
        raise SettingsError(f"--inference-pool: {error}") from None
    server = ApiServer(credentials, "kvcluster-router", timeout=ANSWER_TIMEOUT)
    return PoolApi(server, namespace or credentials.namespace, pool)
