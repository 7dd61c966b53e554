"""Deleting: preconditions, graceful deletion of pods, finalizers, propagation policies."""

from __future__ import annotations

import asyncio
import datetime
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.cluster import CRDS, NAMESPACES, Cluster
from tests.kube.apiserver.customresources import CLEANUP
from tests.kube.apiserver.errors import ApiError, Cause, conflict, invalid
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Change, Name, Object, ResourceKey, Stored

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"


Place = tuple[ResourceKey, Name]


@dataclass(frozen=True)
class Options:
    """`DeleteOptions`."""

    grace: int | None = None
    propagation: str = ""
    uid: str = ""
    resource_version: str = ""
    dry_run: bool = False


def options(body: Any, query: dict[str, str]) -> Options:
    """From a request's body and query. Raises `ApiError` 422 for an unknown policy."""
    body = body if isinstance(body, dict) and body.get("kind") in ("DeleteOptions", None) else {}
    grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    policy = body.get("propagationPolicy") or query.get("propagationPolicy") or ""
    if not policy and (body.get("orphanDependents") or query.get("orphanDependents") == "true"):
        policy = "Orphan"
    if policy not in ("", "Background", "Foreground", "Orphan"):
        raise invalid("meta.k8s.io", "DeleteOptions", "", [
            Cause("propagationPolicy", f'Invalid value: "{policy}": must be one of Background, Foreground, Orphan')
        ])  # fmt: skip
    wanted = body.get("preconditions") or {}
    return Options(
        None if grace is None else int(grace), policy, wanted.get("uid") or "", wanted.get("resourceVersion") or "",
        bool(body.get("dryRun") or query.get("dryRun")),
    )  # fmt: skip


def delete(cluster: Cluster, resource: Resource, stored: Stored, how: Options) -> Object:
    """Delete one object, or mark it. Returns what the client is told."""
    meta = stored.obj["metadata"]
    name = meta["name"]
    for want, have, what in (
        (how.uid, meta["uid"], "UID"), (how.resource_version, meta["resourceVersion"], "ResourceVersion"),
    ):  # fmt: skip
        if want and want != have:
            raise conflict(
                resource.group, resource.plural, name,
                f"the {what} in the precondition ({want}) does not match the {what} in record ({have}). "
                "The object might have been deleted and then recreated",
            )  # fmt: skip
    if resource.kind == "Namespace" and name in ("default", "kube-system"):
        raise ApiError(403, f'namespaces "{name}" is forbidden: this namespace may not be deleted', "Forbidden")
    grace = _grace(resource, stored.obj, how.grace)
    finalizers = _finalizers(resource, meta, how.propagation)
    if how.dry_run:
        return success(resource, stored)
    if grace == 0 and not finalizers and resource.kind != "Namespace":
        last = cluster.store.delete(resource.key, _name(meta))
        return last.obj if resource.kind == "Pod" else success(resource, last)
    already = meta.get("deletionTimestamp") is not None
    if already and meta.get("deletionGracePeriodSeconds", 0) <= grace and finalizers == (meta.get("finalizers") or []):
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
    meta.pop("finalizers", None)
    if finalizers:
        meta["finalizers"] = finalizers
    if resource.kind == "Namespace":
        obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
        meta.pop("deletionGracePeriodSeconds")
    return cluster.store.put(resource.key, _name(meta), obj).obj


def _grace(resource: Resource, obj: Object, asked: int | None) -> int:
    """Seconds a pod on a node has to end; everything else goes at once."""
    if resource.kind != "Pod" or not obj["spec"].get("nodeName"):
        return 0
    if (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    seconds = obj["spec"].get("terminationGracePeriodSeconds", 30) if asked is None else asked
    before = obj["metadata"].get("deletionGracePeriodSeconds")
    return seconds if before is None else min(before, seconds)


def _finalizers(resource: Resource, meta: Object, propagation: str) -> list[str]:
    """The finalizers an object being deleted has; the policy decides about the garbage collector's own."""
    found = list(meta.get("finalizers") or ())
    if propagation:
        found = [f for f in found if f not in (FOREGROUND, ORPHAN)]
        if propagation != "Background":
            found.append(FOREGROUND if propagation == "Foreground" else ORPHAN)
    if resource.kind == "CustomResourceDefinition" and not meta.get("deletionTimestamp"):
        found.append(CLEANUP)
    return list(dict.fromkeys(found))


def success(resource: Resource, stored: Stored) -> Object:
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
