"""Deleting objects, and what a cluster's controllers do when objects go.

Modelled: preconditions, graceful deletion of pods on a node, finalizers; dependents go with the last of their owners,
the objects of a CustomResourceDefinition with it. Checked against the real server by `test_conformance_objects.py`,
and against the real garbage collector by `tests/kube/operator` and `tests/deploy`.

Not modelled, and refused with 501: the policies Foreground and Orphan, dry runs, deletion of namespaces.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.cluster import CRDS, Cluster
from tests.kube.apiserver.customresources import CLEANUP
from tests.kube.apiserver.errors import conflict, not_modelled
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Change, Name, Object, ResourceKey, Stored

Place = tuple[ResourceKey, Name]


@dataclass(frozen=True)
class Options:
    """`DeleteOptions`."""

    grace: int | None = None
    uid: str = ""
    resource_version: str = ""


def options(body: Any, query: dict[str, str]) -> Options:
    """From a request's body and query. Raises `ApiError` 501 for what is not modelled."""
    body = body if isinstance(body, dict) else {}
    for name, harmless in (("propagationPolicy", "Background"), ("orphanDependents", False), ("dryRun", None)):
        asked = body.get(name) or query.get(name)
        if asked and asked != harmless:
            raise not_modelled(f"deletion with {name} {asked}")
    grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    wanted = body.get("preconditions") or {}
    return Options(None if grace is None else int(grace), wanted.get("uid") or "", wanted.get("resourceVersion") or "")


def delete(cluster: Cluster, resource: Resource, stored: Stored, how: Options) -> Object:
    """Delete one object, or mark it. Returns what the client is told."""
    meta = stored.obj["metadata"]
    for want, have, what in (
        (how.uid, meta["uid"], "UID"), (how.resource_version, meta["resourceVersion"], "ResourceVersion"),
    ):  # fmt: skip
        if want and want != have:
            raise conflict(
                resource.group, resource.plural, meta["name"],
                f"the {what} in the precondition ({want}) does not match the {what} in record ({have}). "
                "The object might have been deleted and then recreated",
            )  # fmt: skip
    if resource.kind == "Namespace":
        raise not_modelled("deletion of namespaces")
    grace = _grace(resource, stored.obj, how.grace)
    finalizers = list(meta.get("finalizers") or ())
    if resource.kind == "CustomResourceDefinition" and not meta.get("deletionTimestamp"):
        finalizers.append(CLEANUP)
    if grace == 0 and not finalizers:
        last = cluster.store.delete(resource.key, _name(meta))
        return last.obj if resource.kind == "Pod" else _success(resource, last)
    already = meta.get("deletionTimestamp") is not None
    if already and meta.get("deletionGracePeriodSeconds", 0) <= grace:
        return stored.obj
    return _mark(cluster, resource, stored.copy(), grace, finalizers)


def _name(meta: Object) -> tuple[str, str]:
    return meta.get("namespace", ""), meta["name"]


def _mark(cluster: Cluster, resource: Resource, obj: Object, grace: int, finalizers: list[str]) -> Object:
    meta = obj["metadata"]
    if "generation" in meta and not meta.get("deletionTimestamp"):
        meta["generation"] += 1
    moment = cluster.clock() + datetime.timedelta(seconds=grace)
    meta["deletionTimestamp"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    meta["deletionGracePeriodSeconds"] = grace
    if finalizers:
        meta["finalizers"] = finalizers
    return cluster.store.put(resource.key, _name(meta), obj).obj


def _grace(resource: Resource, obj: Object, asked: int | None) -> int:
    """Seconds a pod on a node has to end; everything else goes at once."""
    if resource.kind != "Pod" or not obj["spec"].get("nodeName"):
        return 0
    if (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    seconds: int = obj["spec"].get("terminationGracePeriodSeconds", 30) if asked is None else asked
    before = obj["metadata"].get("deletionGracePeriodSeconds")
    return seconds if before is None else min(before, seconds)


def _success(resource: Resource, stored: Stored) -> Object:
    details = {"name": stored.obj["metadata"]["name"], "group": resource.group, "kind": resource.plural,
               "uid": stored.obj["metadata"]["uid"]}  # fmt: skip
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": {k: v for k, v in details.items() if v},
    }  # fmt: skip


def _owners(stored: Stored | None) -> set[str]:
    return {r["uid"] for r in stored.obj["metadata"].get("ownerReferences") or ()} if stored else set()


class GarbageCollector:
    """Follows every change; acts on the event loop, after the request that caused it is answered."""

    def __init__(self, cluster: Cluster, on_crash: Callable[[Exception], None]) -> None:
        self._cluster = cluster
        self._on_crash = on_crash
        self._dependents: dict[str, set[Place]] = {}
        self._alive: set[str] = set()
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
        if change.new is not None:
            self._alive.add(uid)
            if after or change.new.obj["metadata"].get("deletionTimestamp"):
                self._enqueue(place)
            return
        self._alive.discard(uid)
        for dependent in self._dependents.get(uid, ()):
            self._enqueue(dependent)
        # A definition that waits for its last object may have lost it.
        definition = ("", f"{change.key[1]}.{change.key[0]}")
        if self._cluster.store.get(CRDS, definition) is not None:
            self._enqueue((CRDS, definition))

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
            if CLEANUP in (meta.get("finalizers") or ()) and self._emptied(name[1]):
                self._release(resource, name, stored)
            return
        references = meta.get("ownerReferences") or []
        alive = [r for r in references if r["uid"] in self._alive]
        if len(alive) == len(references):
            return
        if not alive:
            delete(self._cluster, resource, stored, Options(uid=meta["uid"]))
            return
        obj = stored.copy()
        obj["metadata"]["ownerReferences"] = alive
        self._cluster.store.put(resource.key, name, obj)

    def _emptied(self, definition: str) -> bool:
        """Delete the objects of a definition; whether none of them is left."""
        plural, _, group = definition.partition(".")
        for stored in list(self._cluster.store.all((group, plural))):
            resource = self._resource(stored)
            if resource is not None and not stored.obj["metadata"].get("deletionTimestamp"):
                delete(self._cluster, resource, stored, Options())
        return not any(self._cluster.store.all((group, plural)))

    def _release(self, resource: Resource, name: Name, stored: Stored) -> None:
        """Take the definition's own finalizer off; it goes with the last one."""
        obj = stored.copy()
        left = [f for f in obj["metadata"]["finalizers"] if f != CLEANUP]
        if left:
            obj["metadata"]["finalizers"] = left
            self._cluster.store.put(resource.key, name, obj)
        else:
            del obj["metadata"]["finalizers"]
            self._cluster.store.delete(resource.key, name, obj)
