"""The cluster as the node and its controllers see it: they live beside the fake API server and use its store directly.

What they write is validated and recorded as what comes by HTTP is (`apiserver/writes.py`). Not played: the way
between a controller and the API server, with its delays, faults and stale copies. What the node writes is in no log
of requests.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tests.kube.apiserver import deletion, writes
from tests.kube.apiserver.cluster import Ask, Cluster
from tests.kube.apiserver.errors import ApiError
from tests.kube.apiserver.normalization import plain_copy
from tests.kube.apiserver.patches import merge_patch
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Change

logger = logging.getLogger(__name__)

Object = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name)"""
Handler = Callable[[Object, bool], None]
"""Called with an object that is new or has changed (True), or that is gone (False); it must not write."""
Reconcile = Callable[[Key], float | None]
"""Brings one key nearer to what it should be; the seconds after which to reconcile it again, if any."""

MANAGER = "fake-node"
NAME_LIMIT = 240
RETRY = 0.1


class Kind(NamedTuple):
    """A namespaced kind of the API."""

    api_version: str
    name: str


PODS = Kind("v1", "Pod")
SERVICES = Kind("v1", "Service")
EVENTS = Kind("v1", "Event")
CONFIG_MAPS = Kind("v1", "ConfigMap")
SECRETS = Kind("v1", "Secret")
SERVICE_ACCOUNTS = Kind("v1", "ServiceAccount")
DEPLOYMENTS = Kind("apps/v1", "Deployment")
REPLICA_SETS = Kind("apps/v1", "ReplicaSet")
ENDPOINT_SLICES = Kind("discovery.k8s.io/v1", "EndpointSlice")


def key_of(item: Mapping[str, Any]) -> Key:
    """Namespace and name."""
    return item["metadata"]["namespace"], item["metadata"]["name"]


def now() -> str:
    """The time as the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Api:
    """Reads and writes as the administrator. Objects that it gives are the store's own: they are not to be changed.

    Writes raise `ApiError` for what a client would be refused.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._handlers: dict[tuple[str, str], list[Handler]] = {}
        self._said: set[tuple[str, str, str]] = set()
        cluster.store.subscribe(self._tell)

    def close(self) -> None:
        """Hear of no more changes."""
        self._cluster.store.unsubscribe(self._tell)

    def _resource(self, kind: Kind) -> Resource:
        found = self._cluster.resource_of(*kind)
        assert found is not None, kind
        return found

    def on_change(self, kind: Kind, handler: Handler) -> None:
        """The handler hears of every object there is, and of each change from now on."""
        self._handlers.setdefault(self._resource(kind).key, []).append(handler)
        for item in self.all(kind):
            handler(item, True)

    def _tell(self, change: Change) -> None:
        for handler in self._handlers.get(change.key, ()):
            if change.new is None:
                handler(change.last.obj, False)
            else:
                handler(change.new.obj, True)

    def get(self, kind: Kind, key: Key) -> Object | None:
        """The object; None when there is none."""
        stored = self._cluster.store.get(self._resource(kind).key, key)
        return None if stored is None else stored.obj

    def all(self, kind: Kind) -> list[Object]:
        """All objects in all namespaces, by their names."""
        return [stored.obj for stored in self._cluster.store.all(self._resource(kind).key)]

    def create(self, kind: Kind, item: Object) -> Object:
        """The object as it was stored."""
        body = plain_copy({"apiVersion": kind.api_version, "kind": kind.name, **item})
        namespace = item["metadata"]["namespace"]
        return writes.create(self._cluster, self._resource(kind), namespace, body, Ask(manager=MANAGER))

    def patch(self, kind: Kind, key: Key, patch: Object, subresource: str = "") -> None:
        """A merge patch of the object, if it is there."""
        resource = self._resource(kind)
        stored = self._cluster.store.get(resource.key, key)
        if stored is not None:
            obj = merge_patch(stored.copy(), plain_copy(patch))
            ask = Ask(manager=MANAGER, subresource=subresource)
            writes.update(self._cluster, resource, stored, obj, ask, patch=True)

    def delete(self, kind: Kind, item: Object, grace: int | None = None) -> None:
        """Deletes this very object, if it is there; `grace` overrides a pod's own grace period."""
        resource = self._resource(kind)
        stored = self._cluster.store.get(resource.key, key_of(item))
        if stored is not None and stored.obj["metadata"]["uid"] == item["metadata"]["uid"]:
            deletion.delete(self._cluster, resource, stored, deletion.Options(grace))

    def say(self, kind: Kind, item: Mapping[str, Any], reason: str, message: str, *, warning: bool = False) -> None:
        """An event about this object, unless the very same was said before."""
        metadata = item["metadata"]
        what = (metadata["uid"], reason, message)
        if what in self._said:
            return
        self._said.add(what)
        about = {field: metadata[field] for field in ("namespace", "name", "uid")}
        name = f"{metadata['name'][:NAME_LIMIT]}.{secrets.token_hex(8)}"
        event = {
            "metadata": {"namespace": metadata["namespace"], "name": name},
            "involvedObject": {"apiVersion": kind.api_version, "kind": kind.name, **about},
            "type": "Warning" if warning else "Normal", "reason": reason, "message": message,
            "source": {"component": MANAGER}, "firstTimestamp": now(), "lastTimestamp": now(), "count": 1,
        }  # fmt: skip
        self.create(EVENTS, event)


class WorkQueue:
    """Keys that wait for `reconcile`, each at most once. What the API server refuses is tried again."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile
        self._waiting: dict[Key, None] = {}
        self._work = asyncio.Event()
        self._timers: dict[Key, asyncio.TimerHandle] = {}

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
                    self._process(key)
                    await asyncio.sleep(0)  # others have their turn
                self._work.clear()
        finally:
            for timer in self._timers.values():
                timer.cancel()

    def _process(self, key: Key) -> None:
        try:
            again = self._reconcile(key)
        except ApiError as error:
            again = RETRY
            logger.info("%s of %s: %s", getattr(self._reconcile, "__qualname__", ""), "/".join(key), error)
        if again is not None:
            if key in self._timers:
                self._timers[key].cancel()
            self._timers[key] = asyncio.get_running_loop().call_later(again, self.add, key)
