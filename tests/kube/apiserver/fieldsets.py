"""Sets of fields, as `managedFields` records them: which fields an object has, and which changed.

A field is a tuple of path elements: `f:<name>`, `k:{"name":"x"}` for an item of a list with keys, `v:<value>` for an
item of a set. The rules are those of structured-merge-diff.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from tests.kube.apiserver.schema import Node, child

Field = tuple[str, ...]
Fields = set[Field]

_UNOWNED = {
    ("f:apiVersion",), ("f:kind",), ("f:metadata",), *(
        ("f:metadata", f"f:{name}") for name in (
            "name", "namespace", "creationTimestamp", "selfLink", "uid", "clusterName", "generation",
            "managedFields", "resourceVersion",
        )
    ),
}  # fmt: skip


def item_element(item: Any, node: Node) -> str:
    """How a list names one of its items."""
    if node.list_type == "map" and isinstance(item, dict):
        key = {k: item.get(k, node.key_defaults.get(k)) for k in node.list_keys}
        key = {k: v for k, v in key.items() if v is not None}
        return "k:" + orjson.dumps(key, option=orjson.OPT_SORT_KEYS).decode()
    return "v:" + orjson.dumps(item).decode()


def is_granular(value: Any, node: Node | None) -> bool:
    """Whether a value's parts are owned one by one."""
    if node is None:
        return False
    if isinstance(value, dict):
        return not node.atomic_map and (bool(node.properties) or node.additional is not None or node.preserve)
    return isinstance(value, list) and node.list_type in ("map", "set") and node.items is not None


def fields_of(value: Any, node: Node, path: Field = ()) -> Fields:
    """Every field an object sets, without those nobody owns."""
    found: Fields = set()
    _collect(value, node, path, found)
    return found - _UNOWNED if not path else found


def _collect(value: Any, node: Node, path: Field, found: Fields) -> None:
    if isinstance(value, dict):
        for name, below in value.items():
            known = child(node, name)
            where = (*path, f"f:{name}")
            if below is None or below == {} or name not in node.properties:
                found.add(where)
            if is_granular(below, known):
                _collect(below, known, where, found)  # type: ignore[arg-type]
            else:
                found.add(where)
    else:
        if not value and path:
            found.add(path)
        for item in value:
            where = (*path, item_element(item, node))
            found.add(where)
            if isinstance(item, dict) and node.items is not None and is_granular(item, node.items):
                _collect(item, node.items, where, found)


def compare(old: Any, new: Any, node: Node) -> tuple[Fields, Fields]:
    """The fields added or modified, and those removed, on the way from one object to another."""
    changed: Fields = set()
    removed: Fields = set()
    _compare(old, new, node, (), changed, removed)
    return changed - _UNOWNED, removed - _UNOWNED - changed


def _compare(old: Any, new: Any, node: Node, path: Field, changed: Fields, removed: Fields) -> None:
    if isinstance(new, dict):
        for name, below in new.items():
            known = child(node, name)
            where = (*path, f"f:{name}")
            if name not in old:
                _all_of(below, known, where, changed, name in node.properties)
            elif old[name] != below:
                if is_granular(below, known) and is_granular(old[name], known):
                    _compare(old[name], below, known, where, changed, removed)  # type: ignore[arg-type]
                else:
                    _all_of(below, known, where, changed, True)
                    if is_granular(old[name], known):
                        _collect(old[name], known, where, removed)  # type: ignore[arg-type]
        for name in old:
            if name not in new:
                _all_of(old[name], child(node, name), (*path, f"f:{name}"), removed, False)
    else:
        before = {item_element(item, node): item for item in old}
        after = {item_element(item, node): item for item in new}
        for element, item in after.items():
            where = (*path, element)
            if element not in before:
                changed.add(where)
                if isinstance(item, dict) and node.items is not None:
                    _collect(item, node.items, where, changed)
            elif before[element] != item and node.items is not None:
                _compare(before[element], item, node.items, where, changed, removed)
        for element, item in before.items():
            if element not in after:
                removed.add((*path, element))
                if isinstance(item, dict) and node.items is not None:
                    _collect(item, node.items, (*path, element), removed)


def _all_of(value: Any, node: Node | None, path: Field, found: Fields, declared: bool) -> None:
    if not declared or not is_granular(value, node) or not value:
        found.add(path)
    if is_granular(value, node):
        _collect(value, node, path, found)  # type: ignore[arg-type]


def with_parents(fields: Iterable[Field]) -> Fields:
    """The fields and every field they lie in."""
    found: Fields = set()
    for field in fields:
        for end in range(len(field), 0, -1):
            part = field[:end]
            if part in found:
                break
            found.add(part)
    return found


def encode(fields: Iterable[Field]) -> dict[str, Any]:
    """As `fieldsV1`."""
    members = set(fields)
    root: dict[str, Any] = {}
    for field in sorted(members):
        level = root
        for element in field:
            level = level.setdefault(element, {})
    _mark_inner(root, members, ())
    return root


def _mark_inner(level: dict[str, Any], fields: Fields, path: Field) -> None:
    for element, below in level.items():
        where = (*path, element)
        if below and element != ".":
            if where in fields and "." not in below:
                below["."] = {}
            _mark_inner(below, fields, where)


def decode(raw: dict[str, Any]) -> Fields:
    """From `fieldsV1`."""
    return set(_decode(raw, ()))


def _decode(raw: dict[str, Any], path: Field) -> Iterator[Field]:
    for element, below in raw.items():
        if element == ".":
            yield path
        elif below:
            yield from _decode(below, (*path, element))
        else:
            yield (*path, element)


def show(field: Field) -> str:
    """As conflicts name it: `.spec.template.spec.containers[name="x"].image`."""
    text = ""
    for element in field:
        kind, _, rest = element.partition(":")
        if kind == "f":
            text += f".{rest}"
        elif kind == "k":
            keys = orjson.loads(rest)
            text += "[" + ",".join(f"{k}={orjson.dumps(v).decode()}" for k, v in keys.items()) + "]"
        else:
            text += f"[{'=' if kind == 'v' else ''}{rest}]"
    return text
