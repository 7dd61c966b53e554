"""Workers from the EndpointSlices of a Service: the thin shell around `listwatch`. docs/router.md, "Discovery"."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorkers
from router.discovery.listwatch import QUIET, ApiFailure, Cause, ListWatch, Policy, Watch
from router.discovery.sources import DiscoveryStatus
from runtime.logs import event

logger = logging.getLogger(__name__)


class EventStream(Protocol):
    """An open watch."""

    async def next(self) -> object | None:
        """The next event; None at the end. Raises `ApiFailure`."""

    def close(self) -> None:
        """Cut it. Idempotent."""


class Api(Protocol):
    """The EndpointSlices of one Service at the API server (`apiserver`)."""

    @property
    def namespace(self) -> str: ...

    @property
    def service(self) -> str: ...

    async def list(self) -> object:
        """The answer to a list. Raises `ApiFailure`."""

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        """Open a watch that fails if it outlasts its time by `slack`. Raises `ApiFailure`."""

    async def close(self) -> None:
        """Cut every connection."""


class KubernetesDiscovery:
    """Lists, then watches, for ever. Owns the connection to the API server."""

    def __init__(
        self,
        api: Api,
        *,
        policy: Policy | None = None,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._state = ListWatch(chance, policy)
        self._clock = clock
        self._stream: EventStream | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._lost_at: float | None = None
        """Since when the log says that the API server is lost."""
        self._stale = False
        """The log says so."""

    def status(self) -> DiscoveryStatus:
        state, now = self._state, self._clock()
        return DiscoveryStatus(
            "kubernetes",
            known=state.workers is not None,
            healthy=state.healthy(now),
            age=state.age(now),
            error=str(state.failure or ""),
            failures=state.failures,
            relists=state.relists,
        )

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The workers, again whenever they change. Ends only with its task."""
        told: DiscoveredWorkers | None = None
        try:
            while True:
                try:
                    await self._step()
                except ApiFailure as failure:
                    await self._failed(failure)
                except Exception as error:  # noqa: BLE001  # a list that nobody keeps up to date is noticed too late
                    await self._failed(ApiFailure(Cause.UNEXPECTED, repr(error)))
                workers = self._state.workers
                if workers is not None and workers != told:
                    self._log_workers(workers, first=told is None)
                    told = workers
                    yield workers
        finally:
            self._hang_up()
            await self._api.close()

    async def _step(self) -> None:
        """Ask, or take in, one thing. Raises `ApiFailure`."""
        state = self._state
        if self._stream is not None:
            found = await self._stream.next()
            if found is not None:
                state.event(found, self._clock())
                return
            self._hang_up()
            state.ended(self._clock())
            self._settled()
            return
        watch = state.next(self._clock())
        if watch is None:
            state.listed(await self._api.list(), self._clock())
            return
        self._stream = await self._api.watch(watch, state.policy.slack)
        state.opened(self._clock())
        self._settling = asyncio.get_running_loop().call_later(state.policy.settled, self._settled)

    async def _failed(self, failure: ApiFailure) -> None:
        self._hang_up()
        wait = self._state.failed(failure, self._clock())
        self._log_failure(failure)
        await asyncio.sleep(wait)

    def _hang_up(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        if self._stream is not None:
            self._stream.close()
        self._stream = self._settling = None

    def _settled(self) -> None:
        self._state.settled()
        if self._lost_at is not None:
            event(logger, logging.INFO, "discovery_restored", after_seconds=self._clock() - self._lost_at)
        self._lost_at, self._stale = None, False

    def _log_failure(self, failure: ApiFailure) -> None:
        """One line when it begins to fail, one when that has lasted."""
        now, state = self._clock(), self._state
        if self._lost_at is None and (state.streak > 1 or failure.cause not in QUIET):
            self._lost_at = now
            event(
                logger,
                logging.WARNING,
                "discovery_lost",
                service=self._api.service,
                namespace=self._api.namespace,
                cause=failure.cause.value,
                why=str(failure),
            )
        if not self._stale and state.workers is not None and not state.healthy(now):
            self._stale = True
            event(
                logger,
                logging.ERROR,
                "discovery_stale",
                age=state.age(now),
                workers=len(state.workers),
                why=f"{failure}: the workers last known are used",
            )

    def _log_workers(self, workers: DiscoveredWorkers, *, first: bool) -> None:
        serving = sum(worker.intake is Intake.OPEN for worker in workers.values())
        where = {"service": self._api.service, "namespace": self._api.namespace}
        if first:
            event(logger, logging.INFO, "workers_listed", workers=len(workers), serving=serving, **where)
        if not workers:
            why = "no EndpointSlice names a worker: is there a Service of this name, and has it pods?"
            event(logger, logging.WARNING, "no_workers_listed", why=why, **where)
