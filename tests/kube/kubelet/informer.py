"""What controllers are built of: a local copy of all objects of a kind, and the queue of keys to reconcile.

As in client-go (`SharedInformer`, `RateLimitingQueue`), with one worker a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from tests.kube.kubelet.client import TRANSIENT, Api, ApiError, Key, Object, Resource, key_of

logger = logging.getLogger(__name__)

WATCH_SECONDS = 60
FIRST_DELAY = 0.02
LONGEST_DELAY = 1.0
GONE = 410

Handler = Callable[[Object, bool], None]
"""Called with an object that is new or has changed (True), or that is gone (False)."""


Reconcile = Callable[[Key], Awaitable[float | None]]
"""Brings one key nearer to what it should be; the seconds after which to reconcile it again, if any."""


class Informer:
    """The objects of one kind by namespace and name.

    `wrote` and `deleted` take the answers to our own writes, so that a controller never acts on a copy older than
    what it did itself: events that lag behind are dropped.
    """

    def __init__(self, api: Api, resource: Resource) -> None:
        self.resource = resource
        self.synced = asyncio.Event()
        self._api = api
        self._handlers: list[Handler] = []
        self._items: dict[Key, Object] = {}
        self._buried: set[str] = set()

    def on_change(self, handler: Handler) -> None:
        """From now on the handler hears of each change."""
        self._handlers.append(handler)

    def __iter__(self) -> Iterator[Object]:
        return iter(list(self._items.values()))

    def get(self, key: Key) -> Object | None:
        """The object of this name."""
        return self._items.get(key)

    def wrote(self, item: Object | None) -> None:
        """An object as a write of ours left it."""
        if item is not None:
            self._put(item)

    def deleted(self, item: Object) -> None:
        """An object is gone for good by a request of ours."""
        self._remove(item)

    async def run(self) -> None:
        """Lists and watches until it is cancelled, whatever becomes of the API server."""
        version, delay = "", FIRST_DELAY
        while True:
            try:
                if not version:
                    version = await self._relist()
                async for kind, item in self._api.watch(self.resource, version, WATCH_SECONDS):
                    version = item["metadata"]["resourceVersion"]
                    delay = FIRST_DELAY
                    if kind == "DELETED":
                        self._remove(item)
                    elif kind != "BOOKMARK":
                        self._put(item)
            except ApiError as error:
                if error.code == GONE:
                    version = ""
                logger.info("watch of %s: %s", self.resource.plural, error)
            except TRANSIENT as error:
                logger.info("watch of %s: %r", self.resource.plural, error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)

    async def _relist(self) -> str:
        answer = await self._api.list(self.resource)
        version = str(answer["metadata"]["resourceVersion"])
        listed = {key_of(item): item for item in answer["items"]}
        for key, item in list(self._items.items()):
            # What we have written after the server made this list is not in it.
            if key not in listed and _version(item) <= int(version):
                self._remove(item)
        for item in listed.values():
            self._put(item)
        self.synced.set()
        return version

    def _put(self, item: Object) -> None:
        key = key_of(item)
        present = self._items.get(key)
        if item["metadata"]["uid"] in self._buried:
            return
        if present is not None and present["metadata"]["uid"] == item["metadata"]["uid"]:
            if _version(item) <= _version(present):
                return
        elif present is not None:
            self._remove(present)
        self._items[key] = item
        self._tell(item, True)

    def _remove(self, item: Object) -> None:
        self._buried.add(item["metadata"]["uid"])
        present = self._items.get(key_of(item))
        if present is not None and present["metadata"]["uid"] == item["metadata"]["uid"]:
            del self._items[key_of(item)]
            self._tell(item, False)

    def _tell(self, item: Object, exists: bool) -> None:
        for handler in self._handlers:
            handler(item, exists)


def _version(item: Object) -> int:
    with contextlib.suppress(ValueError):
        return int(item["metadata"]["resourceVersion"])
    return 0


class WorkQueue:
    """Keys that wait for `reconcile`, each at most once. What fails is tried again after a growing delay."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile
        self._waiting: dict[Key, None] = {}
        self._work = asyncio.Event()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """The key needs to be reconciled."""
        self._waiting[key] = None
        self._work.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        try:
            while True:
                await self._work.wait()
                while self._waiting:
                    key = next(iter(self._waiting))
                    del self._waiting[key]
                    await self._process(key)
                self._work.clear()
        finally:
            for timer in self._timers.values():
                timer.cancel()

    async def _process(self, key: Key) -> None:
        try:
            again = await self._reconcile(key)
        except (ApiError, *TRANSIENT) as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            again = min(FIRST_DELAY * 2**failures, LONGEST_DELAY)
            logger.info("%s of %s: %r", getattr(self._reconcile, "__qualname__", ""), "/".join(key), error)
        else:
            self._failures.pop(key, None)
        if again is not None:
            if key in self._timers:
                self._timers[key].cancel()
            self._timers[key] = asyncio.get_running_loop().call_later(again, self.add, key)
