"""What server-side apply makes of a manifest that does not fit its kind's schema: an error of the server's own, 500.

After structured-merge-diff, as Kubernetes 1.36.2 answers for built-in kinds. Modelled are fields that are not declared,
items of a keyed list or a set that are given twice, and strings where numbers, lists or maps belong; what else it
refuses (keys that are missing, numbers where strings belong) is left to the checks that come after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from tests.kube.apiserver.errors import ApiError
from tests.kube.apiserver.fieldsets import item_element
from tests.kube.apiserver.schema import Node, child


def check(obj: dict[str, Any], node: Node) -> None:
    """Raises `ApiError` 500 with every fault, in the order of the server's walk."""
    faults = list(_faults(obj, node, ""))
    if not faults:
        return
    meta = obj.get("metadata") or {}
    subject = f"{meta.get('namespace', '')}/{meta.get('name', '')}; {obj['apiVersion']}, Kind={obj['kind']}"
    what = faults[0] if len(faults) == 1 else "errors:" + "".join(f"\n  {fault}" for fault in faults)
    raise ApiError(500, f"failed to create typed patch object ({subject}): {what}", reason=None)


def _faults(value: Any, node: Node, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name in sorted(value):
            where = f"{path}.{name}"
            known = child(node, name)
            if known is None and not node.preserve:
                yield f"{where}: field not declared in schema"
            elif known is not None:
                yield from _faults(value[name], known, where)
    elif isinstance(value, list) and node.items is not None:
        seen: set[str] = set()
        for number, item in enumerate(value):
            where = f"{path}[{_key(item, node) or number}]"
            if node.list_type in ("map", "set") and (element := item_element(item, node)) in seen:
                yield f"{path}: duplicate entries for key [{_key(item, node) or orjson.dumps(item).decode()}]"
            elif node.list_type in ("map", "set"):
                seen.add(element)
            yield from _faults(item, node.items, where)
    elif isinstance(value, str) and not node.int_or_string and not node.quantity:
        if node.type in ("integer", "number"):
            yield f"{path}: expected numeric (int or float), got string"
        elif node.type in ("array", "object"):
            yield f"{path}: expected {'list' if node.type == 'array' else 'map'}, got &{{{value}}}"


def _key(item: Any, node: Node) -> str:
    """`name="c"`; empty for items that have no keys."""
    if node.list_type != "map" or not isinstance(item, dict):
        return ""
    given = {key: item.get(key, node.key_defaults.get(key)) for key in node.list_keys}
    return ",".join(f"{key}={orjson.dumps(value).decode()}" for key, value in given.items() if value is not None)
