"""The verbs of resources.

Modelled: get, list (in pages), create, update, patch and delete of one object;
objects as they are, and as tables. Checked against the real server by `test_conformance*.py`.

Not modelled, and refused with 501: deletion of collections, `PartialObjectMetadata`.
"""

from __future__ import annotations

import base64
from typing import Any

import orjson

from tests.kube.apiserver import deletion, patches, tables, writes
from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.errors import (
    ApiError,
    bad_request,
    gone,
    invalid,
    method_not_allowed,
    not_found,
    not_modelled,
)
from tests.kube.apiserver.rbac import Attributes, authorized, forbidden
from tests.kube.apiserver.request import MATCH, Call, number
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.selectors import fields_match, labels_match
from tests.kube.apiserver.store import Object, Stored
from tests.kube.apiserver.validation import required
from tests.kube.apiserver.watch import Selection

Answer = tuple[int, bytes]

TABLE, PARTIAL = "as=Table", "as=PartialObjectMetadata"
APPLY = "application/apply-patch+yaml"


def selection(resource: Resource, call: Call) -> Selection:
    """Which objects a list or watch is about."""
    predicates = []
    if text := call.query.get("labelSelector"):
        predicates.append(labels_match(text))
    if text := call.query.get("fieldSelector"):
        predicates.append(fields_match(text, resource.plural))
    if call.name:
        raise not_modelled("a watch of one object by its path")
    namespace = call.namespace if resource.namespaced else ""
    return Selection(resource.key, namespace, lambda obj: all(p(obj) for p in predicates))


def shown(cluster: Cluster, resource: Resource, call: Call, obj: Object) -> bytes:
    """One object as this client wants it."""
    if TABLE in call.accept:
        meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
        return orjson.dumps(tables.table(resource, [obj], cluster.clock(), meta))
    return orjson.dumps(obj)


def found(cluster: Cluster, resource: Resource, call: Call) -> Stored:
    """The object a call names. Raises `ApiError` 404."""
    stored = cluster.store.get(resource.key, (call.namespace if resource.namespaced else "", call.name))
    if stored is None:
        raise not_found(resource.group, resource.plural, call.name)
    return stored


def get(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    stored = found(cluster, resource, call)
    return 200, shown(cluster, resource, call, stored.obj)


def list_(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """A list, in pages where `limit` is given."""
    if MATCH in call.query or number(call.query, "resourceVersion") > cluster.store.revision:
        raise not_modelled("lists of one version, or of one from the future")
    chosen = selection(resource, call)
    revision, after = _place(call.query["continue"]) if call.query.get("continue") else (0, ("", ""))
    if revision and revision < cluster.store.oldest:
        raise gone("The provided continue parameter is too old to display a consistent list result.")
    revision = revision or cluster.store.revision
    stored = cluster.store.at(revision, resource.key, chosen.namespace)
    objects = [s for s in stored if _name(s) > after and chosen.matches(s.obj)]
    meta: Object = {"resourceVersion": str(revision)}
    objects = _page(objects, meta, number(call.query, "limit"))
    if TABLE in call.accept:
        return 200, orjson.dumps(tables.table(resource, [s.obj for s in objects], cluster.clock(), meta))
    items = b",".join(s.raw for s in objects)
    head = orjson.dumps({"kind": resource.list_kind, "apiVersion": resource.api_version, "metadata": meta})
    return 200, head[:-1] + b',"items":[' + items + b"]}"


def _name(stored: Stored) -> tuple[str, str]:
    return stored.obj["metadata"].get("namespace", ""), stored.obj["metadata"]["name"]


def _place(token: str) -> tuple[int, tuple[str, str]]:
    """Where a page begins: at which revision, and after which object."""
    try:
        revision, namespace, name = orjson.loads(base64.urlsafe_b64decode(token))
    except ValueError:
        raise bad_request("invalid continue token: continue key is not valid") from None
    return revision, (namespace, name)


def _page(objects: list[Stored], meta: Object, limit: int) -> list[Stored]:
    """Objects of one page; sets `continue` in the list's metadata where more follow."""
    if limit <= 0 or len(objects) <= limit:
        return objects
    position = [int(meta["resourceVersion"]), *_name(objects[limit - 1])]
    meta["continue"] = base64.urlsafe_b64encode(orjson.dumps(position)).decode()
    meta["remainingItemCount"] = len(objects) - limit
    return objects[:limit]


def create(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    obj = writes.create(cluster, resource, call.namespace if resource.namespaced else "", call.body(), call.ask())
    return 201, shown(cluster, resource, call, obj)


def update(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    stored = found(cluster, resource, call)
    obj = writes.update(cluster, resource, stored, call.body(), call.ask())
    return 200, shown(cluster, resource, call, obj)


def patched(resource: Resource, target: Object, kind: str, body: Any) -> Object:
    """What a patch makes of a copy of an object. Raises `ApiError`."""
    match kind:
        case "application/json-patch+json":
            result = patches.json_patch(target, body)
        case "application/merge-patch+json":
            result = patches.merge_patch(target, body)
        case "application/strategic-merge-patch+json" if not resource.custom:
            if not isinstance(body, dict):
                raise bad_request("a strategic merge patch is an object")
            result = patches.strategic_merge(target, body, resource.schema)
        case _:
            raise ApiError(
                415, "the body of the request was in an unknown format - accepted media types include: "
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
                "UnsupportedMediaType", {},
            )  # fmt: skip
    return result  # type: ignore[no-any-return]


def patch(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    kind = call.headers.get("content-type", "").partition(";")[0].strip()
    body = call.body()
    if kind == APPLY:
        return apply(cluster, resource, call, body)
    stored = found(cluster, resource, call)
    obj = patched(resource, stored.copy(), kind, body)
    obj = writes.update(cluster, resource, stored, obj, call.ask(), patch=True)
    return 200, shown(cluster, resource, call, obj)


def apply(cluster: Cluster, resource: Resource, call: Call, body: Any) -> Answer:
    if not call.query.get("fieldManager"):
        missing = required("fieldManager", "is required for apply patch")
        raise invalid("meta.k8s.io", "PatchOptions", "", [missing])
    namespace = call.namespace if resource.namespaced else ""
    if cluster.store.get(resource.key, (namespace, call.name)) is None and not call.subresource:
        # Who applies what does not exist creates it, and needs to be allowed to.
        wanted = Attributes("create", resource.group, resource.plural, "", namespace, call.name)
        if not authorized(cluster, call.user, wanted):
            raise forbidden(call.user, wanted)
    force = call.query.get("force", "").lower() in ("1", "true")
    obj, created = writes.apply(cluster, resource, namespace, call.name, body, call.ask(), force=force)
    return 201 if created else 200, shown(cluster, resource, call, obj)


def delete(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    how = deletion.options(call.body(), call.query)
    result = deletion.delete(cluster, resource, found(cluster, resource, call), how)
    return 200, orjson.dumps(result)


_ON_OBJECT = {"GET": get, "PUT": update, "PATCH": patch, "DELETE": delete}
_ON_COLLECTION = {"GET": list_, "POST": create}


def handle(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """Everything but watches and subresources of their own kind."""
    if PARTIAL in call.accept:
        raise not_modelled("PartialObjectMetadata")
    if TABLE in call.accept and call.query.get("includeObject", "Metadata") != "Metadata":
        raise not_modelled("tables with other objects than metadata")
    handler = (_ON_OBJECT if call.name else _ON_COLLECTION).get(call.method)
    if handler is None or (call.subresource and handler is delete):
        raise not_modelled(f"{call.verb} of {call.attributes().full}")
    if resource.namespaced and not call.namespace and call.method != "GET":
        raise method_not_allowed()
    return handler(cluster, resource, call)
