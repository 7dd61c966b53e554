"""Creating, updating and applying objects: everything between a decoded request and the store.

Modelled: the order in which a real server decodes, defaults, validates and records owners, which decides what is
refused with which answer. Checked against it by `test_conformance*.py`. There is no admission between.
"""

from __future__ import annotations

import random
import uuid
from typing import Any

from tests.kube.apiserver import constraints, customresources, defaults, ownership
from tests.kube.apiserver.cel import broken_rules
from tests.kube.apiserver.cluster import NAMESPACES, Ask, Cluster
from tests.kube.apiserver.errors import (
    ApiError,
    Cause,
    already_exists,
    bad_request,
    conflict,
    invalid,
    not_found,
)
from tests.kube.apiserver.normalization import (
    as_go_writes,
    canonical_quantities,
    drop_nulls,
    fill_defaults,
    plain_copy,
    prune,
)
from tests.kube.apiserver.rbac import check_escalation
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Object, Stored
from tests.kube.apiserver.validation import BLOCKING, REQUIRED, TYPE, UNCHECKED, check_typed, validate

_SYSTEM = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink")

_GENERATIONS = {
    "Deployment", "ReplicaSet", "PodDisruptionBudget", "NetworkPolicy", "Ingress", "CustomResourceDefinition", "Pod",
    "EndpointSlice", "HorizontalPodAutoscaler",
}  # fmt: skip


def decode(resource: Resource, obj: Any, ask: Ask) -> Object:
    """A body as an object of this resource: kinds checked, unknown fields dealt with."""
    if not isinstance(obj, dict):
        raise bad_request("the body of the request is not an object")
    kind, version = obj.get("kind") or resource.kind, obj.get("apiVersion") or resource.api_version
    if kind != resource.kind:
        raise bad_request(f"the object provided is unrecognized (must be of type {resource.kind}): kind is {kind}")
    if version != resource.api_version:
        raise bad_request(
            f"the API version in the data ({version}) does not match the expected API version ({resource.api_version})"
        )
    obj["apiVersion"], obj["kind"] = version, kind
    if not isinstance(obj.setdefault("metadata", {}), dict):
        raise bad_request("metadata is not an object")
    unknown = prune(obj, resource.schema)
    if unknown and ask.validation == "Strict":
        listed = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise bad_request(f"{_subject(resource)}strict decoding error: {listed}")
    if ask.validation == "Warn":
        ask.warnings += [f'unknown field "{path}"' for path in unknown]
    _check_types(resource, obj)
    return obj


def _check_types(resource: Resource, obj: Object) -> None:
    """Raises `ApiError` 400 where Go could not decode the object: a built-in one, or any metadata."""
    node, value, path = resource.schema, obj, ""
    if resource.custom and "metadata" in node.properties:
        node, value, path = node.properties["metadata"], obj["metadata"], "metadata"
    elif resource.custom:
        return
    wrong = next((cause for cause in validate(value, node, path) if cause.reason == TYPE), None)
    if wrong is not None:
        raise bad_request(f"{_subject(resource)}json: cannot unmarshal: {wrong.text()}")


def _subject(resource: Resource) -> str:
    if resource.custom:
        return ""
    return f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '


def place(resource: Resource, obj: Object, namespace: str) -> None:
    """Set the object's namespace from the path. Raises `ApiError` 400 where the two differ."""
    meta = obj["metadata"]
    if not resource.namespaced:
        meta.pop("namespace", None)
        return
    if meta.get("namespace") and meta["namespace"] != namespace:
        raise bad_request(
            f"the namespace of the provided object does not match the namespace sent on the request: "
            f"{meta['namespace']} != {namespace}"
        )
    meta["namespace"] = namespace


def create(cluster: Cluster, resource: Resource, namespace: str, obj: Object, ask: Ask) -> Object:
    """POST. Returns the object as stored."""
    obj = decode(resource, obj, ask)
    place(resource, obj, namespace)
    meta = obj["metadata"]
    if not meta.get("name") and meta.get("generateName"):
        meta["name"] = meta["generateName"][:58] + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
    name = meta.get("name") or ""
    if not name:
        raise invalid(resource.group, resource.kind, "", [
            Cause("metadata.name", "Required value: name or generateName is required", REQUIRED)
        ])  # fmt: skip
    if meta.pop("resourceVersion", None):
        raise ApiError(500, "resourceVersion should not be set on objects to be created", "InternalError")
    owners = ownership.owned(obj)
    return _insert(cluster, resource, obj, ask, owners, applied=False)


def _insert(
    cluster: Cluster, resource: Resource, obj: Object, ask: Ask, owners: ownership.Owned, *, applied: bool
) -> Object:
    meta = obj["metadata"]
    name, namespace = meta["name"], meta.get("namespace", "")
    if cluster.store.get(resource.key, (namespace, name)) is not None:
        raise already_exists(resource.group, resource.plural, name)
    for field in (*_SYSTEM, "managedFields"):
        meta.pop(field, None)
    if resource.has_status:
        obj.pop("status", None)
    prepared = settle(cluster, resource, None, obj, ask)
    meta = prepared["metadata"]
    meta["uid"] = str(uuid.UUID(int=random.getrandbits(128), version=4))
    meta["creationTimestamp"] = cluster.now()
    if resource.custom or resource.kind in _GENERATIONS:
        meta["generation"] = 1
    if not resource.custom and resource.has_status and (status := defaults.initial_status(resource.kind)):
        prepared["status"] = status
    judge(cluster, resource, None, prepared, ask)
    if namespace and cluster.store.get(NAMESPACES, ("", namespace)) is None:
        raise not_found("", "namespaces", namespace)
    if resource.kind == "CustomResourceDefinition":
        customresources.accept(prepared, cluster.now())
    if not applied:
        manager = ownership.Manager(ask.manager, "Update")
        owners = ownership.after_update(
            None, prepared, resource.schema, manager, owners, resource.api_version, cluster.now(), resource.has_status
        )
    ownership.record(prepared, owners)
    return _keep(cluster, resource, None, prepared, ask)


def update(cluster: Cluster, resource: Resource, old: Stored, obj: Object, ask: Ask, *, patch: bool = False) -> Object:
    """PUT, or what a patch other than apply made of the object."""
    obj = decode(resource, obj, ask)
    before = old.obj
    name = before["metadata"]["name"]
    meta = obj["metadata"]
    if meta.get("name", name) != name:
        raise bad_request(f"the name of the object ({meta.get('name')}) does not match the name on the URL ({name})")
    meta["name"] = name
    place(resource, obj, before["metadata"].get("namespace", ""))
    version = meta.get("resourceVersion") or ""
    if not version and resource.custom and not patch:
        raise invalid(resource.group, resource.kind, name, [
            Cause("metadata.resourceVersion", "Invalid value: 0: must be specified for an update")
        ])  # fmt: skip
    if version and version != before["metadata"]["resourceVersion"]:
        raise conflict(resource.group, resource.plural, name)
    if meta.get("uid", before["metadata"]["uid"]) != before["metadata"]["uid"]:
        raise conflict(
            resource.group, resource.plural, name,
            f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {before['metadata']['uid']}",
        )  # fmt: skip
    sent = meta.get("managedFields")
    owners = ownership.owned(obj if sent else before)
    obj = carry_over(resource, before, obj, ask)
    prepared = settle(cluster, resource, before, obj, ask)
    manager = ownership.Manager(ask.manager, "Update", ask.subresource)
    judge(cluster, resource, before, prepared, ask)
    owners = ownership.after_update(
        before, prepared, resource.schema, manager, owners, resource.api_version, cluster.now(), resource.has_status
    )
    ownership.record(prepared, owners)
    return _keep(cluster, resource, old, prepared, ask)


def carry_over(resource: Resource, before: Object, obj: Object, ask: Ask) -> Object:
    """The new object with what this request may not change taken from the old one."""
    if ask.subresource == "status":
        status = obj.get("status")
        obj = plain_copy(before)
        obj.pop("status", None)
        if status is not None:
            obj["status"] = status
    elif resource.has_status:
        obj.pop("status", None)
        if "status" in before:
            obj["status"] = plain_copy(before["status"])
    meta, old = obj["metadata"], before["metadata"]
    for field in (*_SYSTEM, "resourceVersion", "generateName"):
        meta.pop(field, None)
        if field in old:
            meta[field] = old[field]
    return obj


def settle(cluster: Cluster, resource: Resource, before: Object | None, obj: Object, ask: Ask) -> Object:
    """Defaults and canonical forms; allocates what the server allocates."""
    if resource.custom:
        drop_nulls(obj, resource.schema)
        fill_defaults(obj, resource.schema)
    else:
        as_go_writes(obj, resource.schema)
        defaults.fill(resource.kind, obj)
        if resource.kind == "Service":
            _allocate(cluster, before, obj)
    canonical_quantities(obj, resource.schema)
    meta = obj["metadata"]
    for field in ("labels", "annotations", "finalizers", "ownerReferences"):
        if field in meta and not meta[field]:
            del meta[field]
    return obj


def _allocate(cluster: Cluster, before: Object | None, obj: Object) -> None:
    spec = obj["spec"]
    old = (before or {}).get("spec") or {}
    if not spec.get("clusterIP"):
        spec["clusterIP"] = old.get("clusterIP") or cluster.free_cluster_ip()
    spec["clusterIPs"] = [spec["clusterIP"]]
    exposed = ("NodePort", "LoadBalancer")
    if old.get("type") in exposed and spec["type"] not in exposed:
        # What the server once filled in for the old type goes with it.
        spec.pop("externalTrafficPolicy", None)
        for port in spec.get("ports") or ():
            port.pop("nodePort", None)
    if spec["type"] != "LoadBalancer":
        spec.pop("allocateLoadBalancerNodePorts", None)
    if spec["type"] in exposed:
        known = {port.get("port"): port.get("nodePort") for port in old.get("ports") or ()}
        for port in spec.get("ports") or ():
            if not port.get("nodePort"):
                port["nodePort"] = known.get(port.get("port")) or cluster.free_node_port()


def judge(cluster: Cluster, resource: Resource, before: Object | None, obj: Object, ask: Ask) -> None:
    """Raises `ApiError` for an object, or a change of one, that is not allowed; what did not change was judged."""
    if obj == before:
        return
    causes = list(validate(obj, resource.schema))
    name = obj["metadata"]["name"]
    if not resource.custom:
        causes = [c for c in causes if c.reason != REQUIRED or not c.field.startswith("status.")]
    if isinstance(obj.get("metadata"), dict) and not any(c.field.startswith("metadata") for c in causes):
        causes += constraints.metadata(resource.kind, obj)
    if resource.custom:
        if not any(c.reason in BLOCKING for c in causes):
            causes += broken_rules(obj, before, resource.schema)
        elif resource.schema.has_rules_below:
            causes.append(UNCHECKED)
    else:
        causes += constraints.faults(resource.kind, obj)
        if before is not None:
            causes += constraints.changes(resource.kind, before, obj)
        if ask.subresource == "status":
            causes += constraints.status_faults(resource.kind, obj)
        if resource.kind == "CustomResourceDefinition":
            causes += customresources.faults(obj)
    if causes:
        raise invalid(resource.group, resource.kind, name, causes)
    check_escalation(cluster, resource, before, obj, ask.user)


def apply(
    cluster: Cluster, resource: Resource, namespace: str, name: str, obj: Object, ask: Ask, *, force: bool
) -> tuple[Object, bool]:
    """Server-side apply. Returns the object and whether it was created."""
    if not resource.custom and isinstance(obj, dict) and {"apiVersion", "kind"} <= obj.keys():
        check_typed(obj, resource.schema)
    obj = decode(resource, obj, ask)
    place(resource, obj, namespace)
    meta = obj["metadata"]
    if meta.get("name", name) != name:
        raise bad_request(f"the name of the object ({meta['name']}) does not match the name on the URL ({name})")
    if meta.get("managedFields"):
        raise bad_request("metadata.managedFields must be nil")
    meta["name"] = name
    old = cluster.store.get(resource.key, (namespace, name))
    version = meta.pop("resourceVersion", None)
    uid = meta.get("uid")
    if old is None and (ask.subresource or version or uid):
        if uid or version:
            raise conflict(resource.group, resource.plural, name, "the object does not exist")
        raise not_found(resource.group, resource.plural, name)
    before = old.obj if old else None
    if before is not None and version and version != before["metadata"]["resourceVersion"]:
        raise conflict(resource.group, resource.plural, name)
    manager = ownership.Manager(ask.manager, "Apply", ask.subresource)
    for field in _SYSTEM:
        meta.pop(field, None)
    merged, owners = ownership.apply(
        before, obj, resource.schema, manager, resource.api_version, cluster.now(),
        force=force, has_status=resource.has_status,
    )  # fmt: skip
    if before is None or old is None:
        return _insert(cluster, resource, merged, ask, owners, applied=True), True
    merged = carry_over(resource, before, plain_copy(merged), ask)
    prepared = settle(cluster, resource, before, merged, ask)
    judge(cluster, resource, before, prepared, ask)
    ownership.record(prepared, owners)
    return _keep(cluster, resource, old, prepared, ask), False


def _keep(cluster: Cluster, resource: Resource, old: Stored | None, obj: Object, ask: Ask) -> Object:
    """Store an object that passed everything; a change that changes nothing is none."""
    meta = obj["metadata"]
    name = (meta.get("namespace", ""), meta["name"])
    if old is not None:
        if obj == old.obj:
            return old.obj
        if _content_changed(resource, old.obj, obj) and "generation" in meta:
            meta["generation"] = old.obj["metadata"]["generation"] + 1
        if resource.kind == "CustomResourceDefinition":
            customresources.accept(obj, cluster.now())
    if ask.dry_run:
        meta.setdefault("resourceVersion", "")
        if not meta["resourceVersion"]:
            del meta["resourceVersion"]
        return obj
    if old is not None and meta.get("deletionTimestamp") and not meta.get("finalizers") and not _waits(resource, obj):
        return cluster.store.delete(resource.key, name, obj).obj
    return cluster.store.put(resource.key, name, obj).obj


def _waits(resource: Resource, obj: Object) -> bool:
    """Whether an object being deleted stays although no finalizer holds it."""
    return resource.kind == "Pod" and obj["metadata"].get("deletionGracePeriodSeconds", 0) > 0


def _content_changed(resource: Resource, old: Object, new: Object) -> bool:
    ignored = {"metadata", "status"} if resource.has_status or not resource.custom else {"metadata"}
    if not resource.custom and "spec" in new:
        return old.get("spec") != new.get("spec")
    return {k: v for k, v in old.items() if k not in ignored} != {k: v for k, v in new.items() if k not in ignored}
