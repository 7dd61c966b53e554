"""What a cluster's controllers do when objects go: owner references, propagation, namespaces, custom resources."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.kube.apiserver.cluster import CRDS, NAMESPACES, Cluster
from tests.kube.apiserver.customresources import CLEANUP
from tests.kube.apiserver.deletion import FOREGROUND, ORPHAN, Options, delete
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Change, Name, Object, ResourceKey, Stored

Place = tuple[ResourceKey, Name]


def _owners(stored: Stored | None) -> set[str]:
    return {r["uid"] for r in stored.obj["metadata"].get("ownerReferences") or ()} if stored else set()


class GarbageCollector:
    """Follows every change; acts on the event loop, after the request that caused it is answered."""

    def __init__(self, cluster: Cluster, on_crash: Callable[[Exception], None]) -> None:
        self._cluster = cluster
        self._on_crash = on_crash
        self._dependents: dict[str, set[Place]] = {}
        self._alive: dict[str, Place] = {}
        self._work: deque[Place] = deque()
        self._due = False
        cluster.store.subscribe(self._follow)

    def _follow(self, change: Change) -> None:
        place = (change.key, change.name)
        before, after = _owners(change.old), _owners(change.new)
        for uid in before - after:
            self._dependents.get(uid, set()).discard(place)
        for uid in after - before:
            self._dependents.setdefault(uid, set()).add(place)
        uid = change.last.obj["metadata"]["uid"]
        if change.new is None:
            self._alive.pop(uid, None)
            for dependent in self._dependents.get(uid, ()):
                self._enqueue(dependent)
            for owner in before:
                if owner in self._alive:
                    self._enqueue(self._alive[owner])
            self._container_shrank(change)
            return
        self._alive[uid] = place
        if after or change.new.obj["metadata"].get("deletionTimestamp"):
            self._enqueue(place)

    def _container_shrank(self, change: Change) -> None:
        """A namespace or a definition that waits for its last object may have lost it."""
        namespace = ("", change.name[0])
        held = self._cluster.store.get(NAMESPACES, namespace) if change.name[0] else None
        if held is not None and held.obj["metadata"].get("deletionTimestamp"):
            self._enqueue((NAMESPACES, namespace))
        group, plural = change.key
        name = ("", f"{plural}.{group}")
        if group and self._cluster.store.get(CRDS, name) is not None:
            self._enqueue((CRDS, name))

    def _enqueue(self, place: Place) -> None:
        self._work.append(place)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._process)

    def _process(self) -> None:
        self._due = False
        while self._work:
            key, name = self._work.popleft()
            stored = self._cluster.store.get(key, name)
            resource = self._resource(stored)
            if stored is None or resource is None:
                continue
            try:
                self._visit(resource, name, stored)
            except Exception as error:  # noqa: BLE001  nobody waits for this: `FakeApiServer.stop` raises it
                self._on_crash(error)

    def _resource(self, stored: Stored | None) -> Resource | None:
        return self._cluster.resource_of(stored.obj["apiVersion"], stored.obj["kind"]) if stored else None

    def _visit(self, resource: Resource, name: Name, stored: Stored) -> None:
        meta = stored.obj["metadata"]
        if meta.get("deletionTimestamp"):
            self._finish(resource, name, stored)
            return
        references = meta.get("ownerReferences") or []
        if not references:
            return
        dead = [r for r in references if r["uid"] not in self._alive]
        if not dead:
            return
        if len(dead) == len(references):
            delete(self._cluster, resource, stored, Options(uid=meta["uid"], propagation=self._passed_on(meta)))
            return
        obj = stored.copy()
        obj["metadata"]["ownerReferences"] = [r for r in references if r["uid"] in self._alive]
        self._cluster.store.put(resource.key, name, obj)

    @staticmethod
    def _passed_on(meta: Object) -> str:
        finalizers = meta.get("finalizers") or ()
        return "Orphan" if ORPHAN in finalizers else "Foreground" if FOREGROUND in finalizers else "Background"

    def _finish(self, resource: Resource, name: Name, stored: Stored) -> None:
        """Whatever still stands between an object and its deletion and is this collector's business."""
        finalizers = stored.obj["metadata"].get("finalizers") or []
        uid = stored.obj["metadata"]["uid"]
        if ORPHAN in finalizers:
            for place in list(self._dependents.get(uid, ())):
                self._disown(place, uid)
            self._release(resource, name, ORPHAN)
        elif FOREGROUND in finalizers:
            self._foreground(resource, name, uid)
        elif resource.kind == "Namespace":
            if not self._empty([p for p in self._places() if p[1][0] == name[1]]):
                return
            self._cluster.store.delete(resource.key, name)
        elif CLEANUP in finalizers:
            plural, _, group = name[1].partition(".")
            if self._empty([p for p in self._places() if p[0] == (group, plural)]):
                self._release(resource, name, CLEANUP)

    def _places(self) -> list[Place]:
        return [(key, name) for key, name, _ in self._cluster.store.every()]

    def _empty(self, places: list[Place]) -> bool:
        """Delete these; whether nothing of them is left."""
        for key, name in places:
            stored = self._cluster.store.get(key, name)
            resource = self._resource(stored)
            if stored is not None and resource is not None and not stored.obj["metadata"].get("deletionTimestamp"):
                delete(self._cluster, resource, stored, Options())
        return not any(self._cluster.store.get(*place) for place in places)

    def _foreground(self, resource: Resource, name: Name, uid: str) -> None:
        blocking = False
        for place in list(self._dependents.get(uid, ())):
            stored = self._cluster.store.get(*place)
            kind = self._resource(stored)
            if stored is None or kind is None:
                continue
            meta = stored.obj["metadata"]
            others = [r for r in meta["ownerReferences"] if r["uid"] != uid and r["uid"] in self._alive]
            if others:
                self._disown(place, uid)
                continue
            if not meta.get("deletionTimestamp"):
                policy = "Foreground" if self._dependents.get(meta["uid"]) else "Background"
                delete(self._cluster, kind, stored, Options(propagation=policy))
            blocks: list[Any] = [r.get("blockOwnerDeletion") for r in meta["ownerReferences"] if r["uid"] == uid]
            blocking = blocking or (any(blocks) and self._cluster.store.get(*place) is not None)
        if not blocking:
            self._release(resource, name, FOREGROUND)

    def _disown(self, place: Place, uid: str) -> None:
        stored = self._cluster.store.get(*place)
        if stored is None:
            return
        obj = stored.copy()
        left = [r for r in obj["metadata"]["ownerReferences"] if r["uid"] != uid]
        obj["metadata"].pop("ownerReferences")
        if left:
            obj["metadata"]["ownerReferences"] = left
        self._cluster.store.put(place[0], place[1], obj)

    def _release(self, resource: Resource, name: Name, finalizer: str) -> None:
        """Take a finalizer off; the object goes with the last one."""
        stored = self._cluster.store.get(resource.key, name)
        if stored is None:
            return
        obj = stored.copy()
        left = [f for f in obj["metadata"].get("finalizers") or () if f != finalizer]
        obj["metadata"].pop("finalizers", None)
        if left:
            obj["metadata"]["finalizers"] = left
            self._cluster.store.put(resource.key, name, obj)
        elif obj["metadata"].get("deletionGracePeriodSeconds"):
            self._cluster.store.put(resource.key, name, obj)
        else:
            self._cluster.store.delete(resource.key, name, obj)
