"""The priorities of an InferencePool's InferenceObjectives, kept up to date.

Imported only where Kubernetes is the source of workers or of priorities.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.pool_api import PoolApi
from router.discovery.pool_objects import Objective, Pool, priorities_of, read_objective, read_pool
from router.discovery.sources import Discovery, DiscoveryStatus
from runtime.backoff import Backoff
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Key, ListWatchPolicy
from runtime.kube.reflector import Reflector
from runtime.logs import EventLogger

logger = EventLogger(__name__)

OBJECTIVES = ("inference.networking.x-k8s.io/v1alpha2", "llm-d.ai/v1alpha2")
"""Where InferenceObjectives may be, the older group first: of two with one name the newer group's counts."""
OBJECTIVES_POLICY = ListWatchPolicy(retry=Backoff(15.0, 60.0))
"""Objectives are optional: a kind that the API server does not know is asked for again after half a minute or so."""


@dataclass(eq=False)
class ObjectiveWatch:
    """Follows the objectives of one pool, in both groups. `priorities` has theirs, by name, changed in place.

    `api` is the owner's to close. `clock` in seconds.
    """

    api: PoolApi
    priorities: dict[str, int]
    _: KW_ONLY
    policy: ListWatchPolicy = OBJECTIVES_POLICY
    chance: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    _found: dict[str, Mapping[Key, Objective]] = field(default_factory=dict, init=False)
    """By group."""
    _labels: Mapping[str, str] | None = field(default=None, init=False)
    """Those of the pool; None: not known, or there is none."""

    def pool_labelled(self, labels: Mapping[str, str] | None) -> None:
        """The pool has these labels now, by which objectives may select it; None: there is no such pool."""
        self._labels = labels
        self._merge()

    async def follow_pool(self) -> None:
        """Follow the pool for its labels, for ever, where nothing else does."""
        reflector: Reflector[Pool] = Reflector(
            self.api.pools(),
            read_pool,
            policy=self.policy,
            chance=self.chance,
            clock=self.clock,
            on_failure=lambda failure: self._failed("pool", failure, reflector.state.streak),
            on_settled=lambda: None,
        )
        async with contextlib.aclosing(reflector.follow()) as following:
            async for pools in following:
                pool = pools.get((self.api.namespace, self.api.pool))
                self.pool_labelled(pool.own_labels if pool is not None else None)

    async def run(self) -> None:
        """Until cancelled. Whatever fails is asked for again: requests have the priority 0 meanwhile, or their last."""
        async with asyncio.TaskGroup() as group:
            for api in OBJECTIVES:
                group.create_task(self._follow(api), name=api)

    async def _follow(self, api: str) -> None:
        reflector: Reflector[Objective] = Reflector(
            self.api.objectives(api),
            read_objective,
            policy=self.policy,
            chance=self.chance,
            clock=self.clock,
            on_failure=lambda failure: self._failed(api, failure, reflector.state.streak),
            on_settled=lambda: None,
        )
        async with contextlib.aclosing(reflector.follow()) as following:
            async for objectives in following:
                self._found[api] = objectives
                self._merge()

    def _failed(self, api: str, failure: KubeApiError, streak: int) -> None:
        if failure.status == 404:
            # The CRD is not installed, or no longer; the next list finds it.
            if self._found.pop(api, None) is not None:
                self._merge()
        elif streak == 1 and failure.cause not in (ApiFailureCause.CUT, ApiFailureCause.EXPIRED):
            logger.warning("objectives_unknown", group=api, cause=failure.cause.value, why=str(failure))

    def _merge(self) -> None:
        merged: dict[str, int] = {}
        for api in OBJECTIVES:
            named = ((key[1], each) for key, each in self._found.get(api, {}).items())
            merged |= priorities_of(self.api.pool, self._labels, named)
        for name in self.priorities.keys() - merged.keys():
            del self.priorities[name]
        self.priorities.update(merged)


class WithObjectives:
    """A source of workers, and beside it the objectives of a pool that does not name these workers. Implements
    `Discovery`. Owns the connection of `objectives` to the API server."""

    def __init__(self, source: Discovery, objectives: ObjectiveWatch) -> None:
        self._source = source
        self._objectives = objectives

    def status(self) -> DiscoveryStatus:
        return self._source.status()

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The workers, again whenever they change. Ends only with its task: a list that never changes is no reason to
        follow the objectives no more."""
        following = asyncio.gather(self._objectives.run(), self._objectives.follow_pool())
        try:
            async for workers in self._source.watch():
                yield workers
            await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await self._objectives.api.close()
