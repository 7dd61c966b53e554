"""Schemas as trees of nodes: built-in kinds from the published OpenAPI definitions, custom ones from their CRDs.

One tree serves pruning, defaulting, validation, strategic merging and field ownership alike. The definitions are
those of the package kubernetes-validate. What a CRD may say is bounded by `customresources.py`, which refuses the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import orjson

RELEASE = "v1.35.0"
"""Of Kubernetes, whose API the built-in kinds follow."""

META = "io.k8s.apimachinery.pkg.apis.meta.v1."
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
INT_OR_STRING = "io.k8s.apimachinery.pkg.util.intstr.IntOrString"

# Keys of list items that may be left out, because the server fills them in.
_KEY_DEFAULTS = {"protocol": "TCP"}


@dataclass(eq=False)
class Node:
    """What is known of one value of an object."""

    type: str = ""
    """object, array, string, integer, number, boolean, or empty for anything."""
    properties: dict[str, Node] = field(default_factory=dict)
    additional: Node | None = None
    """What a map's values are."""
    items: Node | None = None
    list_type: str = "atomic"
    list_keys: tuple[str, ...] = ()
    key_defaults: dict[str, Any] = field(default_factory=dict)
    atomic_map: bool = False
    merge_key: str = ""
    """Of a strategic merge patch: items are matched by it; `*` means a set of scalars."""
    preserve: bool = False
    """Unknown fields are kept."""
    nullable: bool = False
    int_or_string: bool = False
    quantity: bool = False
    default: Any = None
    has_default: bool = False
    required: tuple[str, ...] = ()
    facets: dict[str, Any] = field(default_factory=dict)
    """enum, minimum, maxLength, pattern, format ..."""
    rules: tuple[dict[str, Any], ...] = ()
    description: str = ""
    has_defaults_below: bool = False
    has_rules_below: bool = False
    has_quantities_below: bool = False


ANYTHING = Node(preserve=True)

FACETS = (
    "enum", "minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "pattern", "format", "minItems",
    "maxItems",
)  # fmt: skip


class Definitions:
    """The published definitions of the built-in kinds."""

    def __init__(self) -> None:
        folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{RELEASE}-local"
        self.raw: dict[str, Any] = orjson.loads((folder / "_definitions.json").read_bytes())["$defs"]
        self._nodes: dict[str, Node] = {}

    def node(self, name: str) -> Node:
        """The tree of one definition; recursive ones refer to themselves."""
        found = self._nodes.get(name)
        if found is None:
            found = self._nodes[name] = Node()
            self._fill(name, found)
        return found

    def meta(self) -> Node:
        return self.node(META + "ObjectMeta")

    def _fill(self, name: str, node: Node) -> None:
        raw = self.raw[name]
        if name == QUANTITY:
            node.type, node.int_or_string, node.quantity, node.has_quantities_below = "string", True, True, True
        elif name == INT_OR_STRING:
            node.type, node.int_or_string = "", True
        elif name.endswith((".JSON", ".FieldsV1", ".RawExtension")):
            node.preserve, node.nullable = True, True
        elif name.endswith((".JSONSchemaPropsOrArray", ".JSONSchemaPropsOrBool")):
            # A schema may say true or false where a schema could stand; lists of schemas are not structural.
            node.type = "object" if name.endswith("Array") else ""
            node.properties, node.nullable = (
                self.node(name.removesuffix("OrArray").removesuffix("OrBool")).properties,
                True,
            )
        else:
            self._convert(raw, node)

    def _child(self, raw: dict[str, Any]) -> Node:
        reference = raw.get("$ref")
        if reference:
            return self.node(reference.rpartition("/")[2])
        node = Node()
        self._convert(raw, node)
        return node

    def _convert(self, raw: dict[str, Any], node: Node) -> None:
        kind = raw.get("type", "")
        if isinstance(kind, list):
            node.nullable = "null" in kind
            kind = next(k for k in kind if k != "null")
        node.type = kind
        node.nullable = True  # Go decodes null as the zero value everywhere
        # In place: a recursive definition shares the dictionary while it is being filled.
        node.properties.update({name: self._child(child) for name, child in raw.get("properties", {}).items()})
        if isinstance(raw.get("additionalProperties"), dict):
            node.additional = self._child(raw["additionalProperties"])
        if "items" in raw:
            node.items = self._child(raw["items"])
        node.required = tuple(raw.get("required", ()))
        node.facets = {k: raw[k] for k in ("format",) if k in raw}
        node.list_keys = tuple(raw.get("x-kubernetes-list-map-keys", ()))
        node.list_type = raw.get("x-kubernetes-list-type", "atomic")
        node.key_defaults = {k: v for k, v in _KEY_DEFAULTS.items() if k in node.list_keys}
        node.atomic_map = raw.get("x-kubernetes-map-type") == "atomic"
        strategy = raw.get("x-kubernetes-patch-strategy", "")
        if "merge" in strategy:
            node.merge_key = raw.get("x-kubernetes-patch-merge-key", "*")
            if node.list_type == "atomic" and "x-kubernetes-list-type" not in raw:
                node.list_type, node.list_keys = ("set", ()) if node.merge_key == "*" else ("map", (node.merge_key,))
        if kind in ("", "object") and not node.properties and node.additional is None:
            node.preserve = True
        node.description = raw.get("description", "")
        _note_below(node)


def _note_below(node: Node) -> None:
    below = [*node.properties.values(), *(n for n in (node.items, node.additional) if n)]
    node.has_quantities_below = node.quantity or any(n.has_quantities_below for n in below)
    node.has_defaults_below = node.has_default or any(n.has_defaults_below for n in below)
    node.has_rules_below = bool(node.rules) or any(n.has_rules_below for n in below)


def structural(raw: dict[str, Any], meta: Node | None = None) -> Node:
    """The tree of a CRD's schema; `meta` is given at the root, for `metadata`."""
    node = Node()
    node.type = raw.get("type", "")
    node.properties = {name: structural(child) for name, child in raw.get("properties", {}).items()}
    if meta is not None:
        node.properties.setdefault("apiVersion", Node(type="string"))
        node.properties.setdefault("kind", Node(type="string"))
        own = node.properties.get("metadata")
        node.properties["metadata"] = meta
        if own is not None and own.properties.get("name"):
            node.properties["metadata"] = Node(**vars(meta))
            node.properties["metadata"].properties = {**meta.properties, "name": own.properties["name"]}
    if "additionalProperties" in raw:
        node.additional = structural(raw["additionalProperties"])
    if "items" in raw:
        node.items = structural(raw["items"])
    node.int_or_string = raw.get("x-kubernetes-int-or-string", False)
    node.preserve = raw.get("x-kubernetes-preserve-unknown-fields", False)
    node.nullable = raw.get("nullable", False)
    node.has_default = "default" in raw
    node.default = raw.get("default")
    node.required = tuple(raw.get("required", ()))
    node.facets = {key: raw[key] for key in FACETS if key in raw}
    node.rules = tuple(raw.get("x-kubernetes-validations", ()))
    node.list_type = raw.get("x-kubernetes-list-type", "atomic")
    node.list_keys = tuple(raw.get("x-kubernetes-list-map-keys", ()))
    if node.items is not None:
        items = node.items.properties
        node.key_defaults = {k: items[k].default for k in node.list_keys if k in items and items[k].has_default}
    node.atomic_map = raw.get("x-kubernetes-map-type") == "atomic"
    node.description = raw.get("description", "")
    _note_below(node)
    return node


def child(node: Node, name: str) -> Node | None:
    """What is known of field `name`; None where the schema does not know the field."""
    found = node.properties.get(name)
    if found is not None:
        return found
    if node.additional is not None:
        return node.additional
    return ANYTHING if node.preserve else None
