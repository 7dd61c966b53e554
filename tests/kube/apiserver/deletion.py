"""Deleting: preconditions, graceful deletion of pods, finalizers, propagation policies."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.customresources import CLEANUP
from tests.kube.apiserver.errors import ApiError, Cause, conflict, invalid
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Object, Stored

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"


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
