"""CustomResourceDefinitions: the resources they define, their status, their own validity."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from tests.kube.apiserver.cel import broken_rules
from tests.kube.apiserver.celchecks import check_rules
from tests.kube.apiserver.errors import Cause
from tests.kube.apiserver.resources import Column, Resource, Scale
from tests.kube.apiserver.schema import ANYTHING, Node, structural
from tests.kube.apiserver.structural import plain_copy, prune
from tests.kube.apiserver.validation import invalid, required, type_of, validate

Object = dict[str, Any]

AGE = Column("Age", ".metadata.creationTimestamp", "date")
APPROVED = "api-approved.kubernetes.io"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


def _schema(version: Object, meta: Node | None) -> Node:
    raw = (version.get("schema") or {}).get("openAPIV3Schema")
    if raw is None:
        return ANYTHING
    return structural(raw, meta)


def serve(definition: Object | None, meta: Node) -> list[Resource]:
    """The resources of a definition: one for each served version."""
    if definition is None:
        return []
    spec = definition["spec"]
    names = spec["names"]
    found = []
    for version in spec["versions"]:
        if not version.get("served"):
            continue
        subresources = version.get("subresources") or {}
        scale = subresources.get("scale")
        columns = tuple(
            Column(c["name"], c["jsonPath"], c["type"], c.get("priority", 0), c.get("description", ""))
            for c in version.get("additionalPrinterColumns") or ()
        )
        found.append(
            Resource(
                group=spec["group"],
                version=version["name"],
                plural=names["plural"],
                kind=names["kind"],
                namespaced=spec["scope"] == "Namespaced",
                schema=_schema(version, meta),
                short_names=tuple(names.get("shortNames") or ()),
                categories=tuple(names.get("categories") or ()),
                subresources=tuple(s for s in ("status", "scale") if s in subresources),
                columns=columns or (AGE,),
                scale=Scale(scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath", ""))
                if scale else None,
                custom=True,
                selectable=frozenset(f["jsonPath"].lstrip(".") for f in version.get("selectableFields") or ()),
                singular=names.get("singular") or names["kind"].lower(),
                list_kind=names.get("listKind") or f"{names['kind']}List",
                openapi=(version.get("schema") or {}).get("openAPIV3Schema") or {"type": "object"},
                definition=f"{'.'.join(reversed(spec['group'].split('.')))}.{version['name']}.{names['kind']}",
            )
        )  # fmt: skip
    return found


def accept(definition: Object, now: str) -> None:
    """Set the status of a definition whose names are free, in place."""
    spec = definition["spec"]
    status = definition.setdefault("status", {})
    status["acceptedNames"] = spec["names"]
    stored = [v["name"] for v in spec["versions"] if v.get("storage")]
    status["storedVersions"] = list(dict.fromkeys([*(status.get("storedVersions") or ()), *stored]))
    if not status.get("conditions"):
        status["conditions"] = [
            {"type": "NamesAccepted", "status": "True", "lastTransitionTime": now, "reason": "NoConflicts",
             "message": "no conflicts found"},
            {"type": "Established", "status": "True", "lastTransitionTime": now, "reason": "InitialNamesAccepted",
             "message": "the initial names have been accepted"},
        ]  # fmt: skip


def _approved(definition: Object) -> bool:
    return bool((definition["metadata"].get("annotations") or {}).get(APPROVED))


def faults(definition: Object) -> Iterator[Cause]:
    """Faults of a definition."""
    spec = definition.get("spec") or {}
    names = spec.get("names") or {}
    expected = f"{names.get('plural', '')}.{spec.get('group', '')}"
    name = definition["metadata"]["name"]
    if name != expected:
        yield invalid("metadata.name", name, 'must be spec.names.plural+"."+spec.group')
    if re.search(r"(^|\.)(k8s|kubernetes)\.io$", spec.get("group", "")) and not _approved(definition):
        why = f'protected groups must have approval annotation "{APPROVED}"'
        more = "see https://github.com/kubernetes/enhancements/pull/1111"
        yield required(f"metadata.annotations[{APPROVED}]", f"{why}, {more}")
    versions = spec.get("versions") or []
    if sum(bool(v.get("storage")) for v in versions) != 1:
        yield invalid("spec.versions", versions, "must have exactly one version marked as storage version")
    schemas = [(version.get("schema") or {}).get("openAPIV3Schema") for version in versions]
    # The server keeps a schema that all versions share once, and calls it by that place.
    shared = all(raw == schemas[0] for raw in schemas)
    for number, raw in enumerate(schemas):
        where = "spec.validation.openAPIV3Schema" if shared else f"spec.versions[{number}].schema.openAPIV3Schema"
        if raw is None:
            yield required(f"spec.versions[{number}].schema.openAPIV3Schema", "schemas are required")
        elif not (shared and number):
            yield from (Cause(where + field, message, reason) for field, message, reason in _judged(orjson.dumps(raw)))


@lru_cache(maxsize=64)
def _judged(schema: bytes) -> list[tuple[str, str, str]]:
    """Field (below the schema), message and reason of every fault of a schema: what is worse hides what follows."""
    raw = orjson.loads(schema)
    if raw.get("type") != "object":
        return [(".type", "Required value: must not be empty at the root", "FieldValueRequired")]
    node = structural(raw)
    found = list(_structural(raw, "")) or list(_defaults(node, "")) or list(check_rules(node, resource=True))
    return [(cause.field, cause.message, cause.reason) for cause in found]


def _defaults(node: Node, path: str) -> Iterator[Cause]:
    """Where a default is not valid as it is written: nested defaults are not filled in before it is judged."""
    if node.has_default:
        where = f"{path}.default"
        if prune(plain_copy(node.default), node):
            yield invalid(where, node.default, "must not have unknown fields")
        yield from list(validate(node.default, node, where)) or [
            # First as if nothing changed, then as if there had been nothing.
            *broken_rules(node.default, node.default, node, where),
            *broken_rules(node.default, None, node, where),
        ]
    for name, below in node.properties.items():
        yield from _defaults(below, f"{path}.properties[{name}]")
    if node.items is not None:
        yield from _defaults(node.items, f"{path}.items")


def _structural(raw: Object, path: str) -> Iterator[Cause]:
    """Where a schema is not structural."""
    free = raw.get("x-kubernetes-int-or-string") or raw.get("x-kubernetes-preserve-unknown-fields")
    if not raw.get("type") and not free:
        yield required(f"{path}.type", "must not be empty for specified object fields")
    if raw.get("type") == "array" and "items" not in raw:
        yield required(f"{path}.items", "must be specified")
    if raw.get("properties") and raw.get("additionalProperties"):
        yield Cause(f"{path}.additionalProperties", "Forbidden: excludes properties, and the other way round",
                    "FieldValueForbidden")  # fmt: skip
    if raw.get("uniqueItems"):
        yield Cause(f"{path}.uniqueItems", "Forbidden: uniqueItems cannot be set to true since the runtime complexity "
                    "becomes quadratic", "FieldValueForbidden")  # fmt: skip
    if raw.get("$ref"):
        yield Cause(f"{path}.$ref", "Forbidden: $ref is not supported", "FieldValueForbidden")
    yield from _list_type(raw, path)
    for name, below in (raw.get("properties") or {}).items():
        if not path and name == "metadata":
            continue
        yield from _structural(below, f"{path}.properties[{name}]")
    if isinstance(raw.get("items"), dict):
        yield from _structural(raw["items"], f"{path}.items")
    if isinstance(raw.get("additionalProperties"), dict):
        yield from _structural(raw["additionalProperties"], f"{path}.additionalProperties")


def _list_type(raw: Object, path: str) -> Iterator[Cause]:
    kind = raw.get("x-kubernetes-list-type")
    keys = raw.get("x-kubernetes-list-map-keys") or []
    if kind == "map" and not keys:
        yield required(f"{path}.x-kubernetes-list-map-keys", "must not be empty if x-kubernetes-list-type is map")
    if keys and kind != "map":
        yield invalid(f"{path}.x-kubernetes-list-type", kind, "must be map if x-kubernetes-list-map-keys is non-empty")
    items = raw.get("items") or {}
    for key in keys:
        declared = (items.get("properties") or {}).get(key)
        if declared is None:
            yield invalid(f"{path}.x-kubernetes-list-map-keys", key, "entries must all be names of item properties")
        elif key not in (items.get("required") or ()) and "default" not in declared:
            yield required(f"{path}.items.properties[{key}].default",
                           "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required "
                           "property")  # fmt: skip
    if kind == "set" and items and type_of_schema(items) in ("object", "array"):
        atomic = items.get("x-kubernetes-map-type") == "atomic" or items.get("x-kubernetes-list-type") == "atomic"
        if not atomic:
            yield invalid(f"{path}.items", type_of(items), "forbidden for items of a list of list type set")


def type_of_schema(raw: Object) -> str:
    return str(raw.get("type", ""))
