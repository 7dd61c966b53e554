"""A local copy of all objects of a kind, kept up to date by list and watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from tests.kube.kubelet.client import TRANSIENT, Api, ApiError, Key, Object, Resource, key_of

logger = logging.getLogger(__name__)

WATCH_SECONDS = 60
FIRST_DELAY = 0.05
LONGEST_DELAY = 1.0
GONE = 410

Handler = Callable[[Object, bool], None]
"""Called with an object that is new or has changed (True), or that is gone (False)."""


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
