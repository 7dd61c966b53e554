"""Keeps a copy of one collection of the API server: the asyncio shell around `listwatch`. client-go's Reflector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Key, ListWatch, ListWatchPolicy, Watch

T = TypeVar("T")


class EventStream(Protocol):
    """An open watch."""

    async def next(self) -> object | None:
        """The next event; None at the end. Raises `KubeApiError`."""

    def close(self) -> None:
        """Cut it. Idempotent."""


class Collection(Protocol):
    """One collection of objects at an API server."""

    async def list(self) -> object:
        """The answer to a list. Raises `KubeApiError`."""

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        """Open a watch that fails if it outlasts its time by `slack` seconds. Raises `KubeApiError`."""

    async def close(self) -> None:
        """Cut every connection."""


class Reflector(Generic[T]):
    """Lists, then watches, for ever. Owns the collection's connections.

    `on_failure` is called after each failure, `on_settled` once a watch works. `clock` in seconds.
    """

    def __init__(
        self,
        collection: Collection,
        read: Callable[[Mapping[str, Any]], T],
        *,
        policy: ListWatchPolicy | None,
        chance: Callable[[], float],
        clock: Callable[[], float],
        on_failure: Callable[[KubeApiError], None],
        on_settled: Callable[[], None],
    ) -> None:
        self.state = ListWatch(read, chance, policy)
        self._collection = collection
        self._clock = clock
        self._on_failure = on_failure
        self._on_settled = on_settled
        self._stream: EventStream | None = None
        self._settling: asyncio.TimerHandle | None = None

    async def follow(self) -> AsyncGenerator[Mapping[Key, T], None]:
        """The objects, again whenever they may have changed. Ends only with its task."""
        told = 0
        try:
            while True:
                try:
                    await self._step()
                except KubeApiError as failure:
                    await self._failed(failure)
                except Exception as error:  # noqa: BLE001  # a copy that nobody keeps up to date is noticed too late
                    await self._failed(KubeApiError.of(ApiFailureCause.UNEXPECTED, repr(error)))
                if self.state.objects is not None and self.state.revision != told:
                    told = self.state.revision
                    yield self.state.objects
        finally:
            self._hang_up()
            await self._collection.close()

    async def _step(self) -> None:
        """Ask, or take in, one thing. Raises `KubeApiError`."""
        state = self.state
        if self._stream is not None:
            found = await self._stream.next()
            if found is not None:
                state.event(found, self._clock())
                return
            self._hang_up()
            state.ended(self._clock())
            self._on_settled()
            return
        watch = state.next(self._clock())
        if watch is None:
            state.listed(await self._collection.list(), self._clock())
            return
        self._stream = await self._collection.watch(watch, state.policy.slack)
        state.opened(self._clock())
        self._settling = asyncio.get_running_loop().call_later(state.policy.settled, self._settled)

    async def _failed(self, failure: KubeApiError) -> None:
        self._hang_up()
        wait = self.state.failed(failure, self._clock())
        self._on_failure(failure)
        await asyncio.sleep(wait)

    def _hang_up(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        if self._stream is not None:
            self._stream.close()
        self._stream = self._settling = None

    def _settled(self) -> None:
        self.state.settled()
        self._on_settled()
