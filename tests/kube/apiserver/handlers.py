"""The verbs of resources."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import orjson

from tests.kube.apiserver import deletion, events, patches, request, tables, writes
from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.errors import ApiError, Cause, bad_request, gone, invalid, method_not_allowed, not_found
from tests.kube.apiserver.rbac import Attributes, authorized, forbidden, review
from tests.kube.apiserver.request import Call, user_named
from tests.kube.apiserver.resources import REVIEWS, Resource
from tests.kube.apiserver.selectors import fields_match, labels_match
from tests.kube.apiserver.store import Object, Stored
from tests.kube.apiserver.watch import Selection

Answer = tuple[int, bytes]

TABLE, PARTIAL, PARTIAL_LIST = "as=Table", "as=PartialObjectMetadata", "as=PartialObjectMetadataList"

APPLY = "application/apply-patch+yaml"


def selection(resource: Resource, call: Call) -> Selection:
    """Which objects a list, watch or deletecollection is about."""
    predicates = []
    if text := call.query.get("labelSelector"):
        predicates.append(labels_match(text))
    if text := call.query.get("fieldSelector"):
        predicates.append(fields_match(text, resource.plural, resource.selectable))
    if call.name:
        predicates.append(lambda obj: obj["metadata"]["name"] == call.name)
    namespace = call.namespace if resource.namespaced else ""
    return Selection(resource.key, namespace, lambda obj: all(p(obj) for p in predicates))


def renderer(cluster: Cluster, resource: Resource, call: Call) -> Callable[[Stored], bytes]:
    """How this client wants objects in a watch: as they are, as tables of one row, or their metadata only."""
    if TABLE in call.accept:
        include = call.query.get("includeObject", "Metadata")
        first = True

        def as_table(stored: Stored) -> bytes:
            nonlocal first
            meta = {"resourceVersion": stored.obj["metadata"]["resourceVersion"]}
            shown = tables.table(resource, [stored.obj], cluster.clock(), include, meta, headers=first)
            first = False
            return orjson.dumps(shown)

        return as_table
    if PARTIAL in call.accept:
        return lambda stored: orjson.dumps(partial(stored.obj))
    return lambda stored: events.raw(resource, stored)


def partial(obj: Object) -> Object:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def shown(cluster: Cluster, resource: Resource, call: Call, obj: Object, raw: bytes | None = None) -> bytes:
    """One object as this client wants it."""
    if TABLE in call.accept:
        include = call.query.get("includeObject", "Metadata")
        meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
        return orjson.dumps(tables.table(resource, [obj], cluster.clock(), include, meta))
    if PARTIAL in call.accept and obj.get("kind") != "Status":
        return orjson.dumps(partial(obj))
    return raw if raw is not None else orjson.dumps(obj)


def found(cluster: Cluster, resource: Resource, call: Call) -> Stored:
    """The object a call names. Raises `ApiError` 404."""
    stored = cluster.store.get(resource.key, (call.namespace if resource.namespaced else "", call.name))
    if stored is None:
        raise not_found(resource.group, resource.plural, call.name)
    return stored


def get(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    if (asked := request.version(call.query)) > cluster.store.revision:
        raise request.too_large(asked, cluster.store.revision)
    stored = found(cluster, resource, call)
    return 200, shown(cluster, resource, call, stored.obj, events.raw(resource, stored))


def list_(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """A list, in pages where `limit` is given."""
    wanted = request.of_list(call.query)
    if wanted.version > cluster.store.revision:
        raise request.too_large(wanted.version, cluster.store.revision)
    chosen = selection(resource, call)
    revision, after = _place(call.query["continue"]) if call.query.get("continue") else (0, ("", ""))
    if revision and revision < cluster.store.oldest:
        raise gone("The provided continue parameter is too old to display a consistent list result.")
    revision = revision or (wanted.version if wanted.exact else cluster.store.revision)
    stored = cluster.store.at(revision, resource.key, chosen.namespace)
    objects = [s for s in stored if _name(s) > after and chosen.matches(s.obj)]
    meta: Object = {"resourceVersion": str(revision)}
    objects = _page(objects, meta, wanted.limit)
    if TABLE in call.accept:
        include = call.query.get("includeObject", "Metadata")
        return 200, orjson.dumps(tables.table(resource, [s.obj for s in objects], cluster.clock(), include, meta))
    if PARTIAL in call.accept:
        kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
        items = b",".join(orjson.dumps(partial(s.obj)) for s in objects)
    else:
        kind, version = resource.list_kind, resource.api_version
        items = b",".join(events.raw(resource, s) for s in objects)
    head = orjson.dumps({"kind": kind, "apiVersion": version, "metadata": meta})
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
    body = call.body()
    if resource.plural in REVIEWS:
        obj = writes.decode(resource, body, call.ask())
        return 201, orjson.dumps(review(cluster, resource, obj, call.user, user_named))
    obj = writes.create(cluster, resource, call.namespace if resource.namespaced else "", body, call.ask())
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
    if call.query.get("force"):
        raise _options_invalid("force", "Forbidden: may not be specified for non-apply patch")
    stored = found(cluster, resource, call)
    obj = patched(resource, stored.copy(), kind, body)
    obj = writes.update(cluster, resource, stored, obj, call.ask(), patch=True)
    return 200, shown(cluster, resource, call, obj)


def _options_invalid(field: str, message: str) -> ApiError:
    return invalid("meta.k8s.io", "PatchOptions", "", [Cause(field, message, "FieldValueRequired")])


def apply(cluster: Cluster, resource: Resource, call: Call, body: Any) -> Answer:
    if not call.query.get("fieldManager"):
        raise _options_invalid("fieldManager", "Required value: is required for apply patch")
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


def delete_collection(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    how = deletion.options(call.body(), call.query)
    chosen = selection(resource, call)
    objects = [s for s in cluster.store.all(resource.key, chosen.namespace) if chosen.matches(s.obj)]
    for stored in objects:
        deletion.delete(cluster, resource, stored, how)
    items = [s.obj for s in objects]
    meta = {"resourceVersion": str(cluster.store.revision)}
    listed = {"kind": resource.list_kind, "apiVersion": resource.api_version, "metadata": meta, "items": items}
    return 200, orjson.dumps(listed)


_ON_OBJECT = {"GET": get, "HEAD": get, "PUT": update, "PATCH": patch, "DELETE": delete}
_ON_COLLECTION = {"GET": list_, "HEAD": list_, "POST": create, "DELETE": delete_collection}


def _newer_event(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """A write of an event in the shape of events.k8s.io: done in the other shape."""
    core = cluster.registry.find("", "v1", "events")
    body = call.body()
    if core is None or not isinstance(body, dict):
        raise bad_request("an event is written as an object or a merge patch")
    call.raw = orjson.dumps(events.to_core(body))
    status, raw = handle(cluster, core, call)
    return status, orjson.dumps(events.to_newer(orjson.loads(raw)))


def handle(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """Everything but watches and subresources of their own kind."""
    if events.is_newer(resource) and call.method in ("POST", "PUT", "PATCH"):
        return _newer_event(cluster, resource, call)
    handler = (_ON_OBJECT if call.name else _ON_COLLECTION).get(call.method)
    if handler is None or call.verb not in resource.verbs or (call.subresource and handler is delete):
        raise method_not_allowed()
    if resource.namespaced and not call.namespace and call.method not in ("GET", "HEAD"):
        raise method_not_allowed()
    return handler(cluster, resource, call)
