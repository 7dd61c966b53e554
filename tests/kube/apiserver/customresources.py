"""CustomResourceDefinitions: the resources they define, their status, their own validity.

Modelled: one version with a structural schema, defaults, rules (`cel.py`), status and scale, printer columns; what a
real server refuses of these, defaults included. Checked against the real server by `test_conformance.py` and
`test_conformance_definitions.py`.

Not modelled, and refused: other versions and conversion, the keywords of JSON schema that are not in `KEYWORDS`,
formats that are not in `FORMATS`, selectable fields. Names are accepted without a look at those of other definitions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from tests.kube.apiserver.cel import broken_rules, check_rules
from tests.kube.apiserver.errors import Cause, unmodelled
from tests.kube.apiserver.normalization import plain_copy, prune
from tests.kube.apiserver.resources import Column, Resource, Scale
from tests.kube.apiserver.schema import FACETS, Node, structural
from tests.kube.apiserver.tables import steps
from tests.kube.apiserver.validation import invalid, required, validate

Object = dict[str, Any]

VERSION = {"name", "served", "storage", "schema", "subresources", "additionalPrinterColumns"}
"""What of a version is modelled."""
KEYWORDS = {
    *FACETS, "type", "description", "properties", "additionalProperties", "items", "required", "default", "nullable",
    "anyOf", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
}  # fmt: skip
"""What of a schema is modelled."""
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]
FORMATS = {None, "date-time", "int32", "int64"}
APPROVED = "api-approved.kubernetes.io"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


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
                schema=structural(version["schema"]["openAPIV3Schema"], meta),
                short_names=tuple(names.get("shortNames") or ()),
                categories=tuple(names.get("categories") or ()),
                subresources=tuple(s for s in ("status", "scale") if s in subresources),
                columns=columns,
                scale=Scale(scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath", ""))
                if scale else None,
                custom=True,
                singular=names.get("singular") or names["kind"].lower(),
                list_kind=names.get("listKind") or f"{names['kind']}List",
                openapi=version["schema"]["openAPIV3Schema"],
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
    if len(versions) != 1 or not versions[0].get("storage"):
        yield unmodelled("spec.versions", "definitions with more or less than one version, which is the stored one")
        return
    (version,) = versions
    for name in version.keys() - VERSION:
        yield unmodelled(f"spec.versions[0].{name}", f"{name} of a version")
    for path in _paths(version):
        try:
            steps(path)
        except ValueError as error:
            yield unmodelled("spec.versions[0]", str(error))
    raw = (version.get("schema") or {}).get("openAPIV3Schema")
    if raw is None:
        yield required("spec.versions[0].schema.openAPIV3Schema", "schemas are required")
        return
    # The server keeps a schema that all versions share once, and calls it by that place.
    for field, message, reason in _judged(orjson.dumps(raw)):
        yield Cause(f"spec.validation.openAPIV3Schema{field}", message, reason)


def _paths(version: Object) -> Iterator[str]:
    """The paths by which a version says where its values are."""
    for column in version.get("additionalPrinterColumns") or ():
        yield column["jsonPath"]
    yield from ((version.get("subresources") or {}).get("scale") or {}).values()


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
    for name in raw.keys() - KEYWORDS:
        yield unmodelled(f"{path}.{name}", f"{name} in a schema")
    if raw.get("anyOf", INT_OR_STRING) != INT_OR_STRING:
        yield unmodelled(f"{path}.anyOf", "alternatives other than int-or-string")
    if raw.get("format") not in FORMATS:
        yield unmodelled(f"{path}.format", f"the format {raw['format']}")
    free = raw.get("x-kubernetes-int-or-string") or raw.get("x-kubernetes-preserve-unknown-fields")
    if not raw.get("type") and not free:
        yield required(f"{path}.type", "must not be empty for specified object fields")
    if raw.get("type") == "array" and "items" not in raw:
        yield required(f"{path}.items", "must be specified")
    if raw.get("properties") and raw.get("additionalProperties"):
        yield Cause(f"{path}.additionalProperties", "Forbidden: excludes properties, and the other way round",
                    "FieldValueForbidden")  # fmt: skip
    yield from _list_type(raw, path)
    for name, below in (raw.get("properties") or {}).items():
        if not path and name == "metadata":
            continue
        yield from _structural(below, f"{path}.properties[{name}]")
    for name in ("items", "additionalProperties"):
        if name in raw:
            yield from _structural(raw[name], f"{path}.{name}")


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
    if kind == "set" and items.get("type") in ("object", "array"):
        yield unmodelled(f"{path}.items", "sets of objects or lists")
