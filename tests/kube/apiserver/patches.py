"""JSON patches (by the library), merge patches and strategic merge patches.

Modelled: what kubectl (`apply` on the client's side, `rollout restart`, `label`), helm and kopf send. Checked against
the real server by `test_conformance_objects.py` and `test_kubectl.py`. Not modelled, and refused: the directives
`$patch: replace`, `$retainKeys` and `$deleteFromPrimitiveList` of strategic merge patches.
"""

from __future__ import annotations

from typing import Any

import jsonpatch
from jsonpointer import JsonPointerException

from tests.kube.apiserver.errors import ApiError, bad_request, not_modelled
from tests.kube.apiserver.normalization import plain_copy
from tests.kube.apiserver.schema import Node, child

ORDER = "$setElementOrder/"


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386; the target is changed in place where it can be."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902. Raises `ApiError` where an operation does not apply."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    try:
        return jsonpatch.apply_patch(target, operations)
    except (jsonpatch.JsonPatchException, JsonPointerException) as error:
        why = f"the server rejected our request due to an error in our request: {error}"
        raise ApiError(422, why, "Invalid", {}) from None


def strategic_merge(target: Any, patch: dict[str, Any], node: Node) -> Any:
    """A strategic merge patch: lists merge by the keys the schema names. The target is changed in place."""
    if not isinstance(target, dict):
        target = {}
    for name, value in patch.items():
        if not name.startswith("$"):
            _merge_field(target, name, value, child(node, name))
        elif not name.startswith(ORDER):
            raise not_modelled(f"{name} in a strategic merge patch")
    for name, order in patch.items():
        listed = name.removeprefix(ORDER)
        if listed != name and (known := child(node, listed)) is not None and isinstance(target.get(listed), list):
            target[listed] = _ordered(target[listed], order, known.merge_key)
    return target


def _merge_field(target: dict[str, Any], name: str, value: Any, node: Node | None) -> None:
    if value is None:
        target.pop(name, None)
    elif isinstance(value, dict) and node is not None:
        target[name] = strategic_merge(target.get(name), value, node)
    elif isinstance(value, list) and node is not None and node.merge_key:
        target[name] = _merge_list(target.get(name) or [], value, node)
    else:
        target[name] = plain_copy(value)


def _merge_list(old: list[Any], patch: list[Any], node: Node) -> list[Any]:
    key = node.merge_key
    if key == "*":
        return [*old, *(item for item in patch if item not in old)]
    merged = list(old)
    for item in patch:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        at = next((i for i, known in enumerate(merged) if known.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            merged = [known for known in merged if known.get(key) != item[key]]
        elif at is None:
            merged.append(strategic_merge({}, item, node.items or Node()))
        else:
            merged[at] = strategic_merge(merged[at], item, node.items or Node())
    return merged


def _ordered(items: list[Any], order: list[Any], key: str) -> list[Any]:
    """Items in the order a patch wants; those it does not name keep their place after what stood before them."""
    wanted = {(o.get(key) if isinstance(o, dict) else o): n for n, o in enumerate(order)}

    def name(item: Any) -> Any:
        return item.get(key) if isinstance(item, dict) else item

    named = iter(sorted((i for i in items if name(i) in wanted), key=lambda i: wanted[name(i)]))
    return [next(named) if name(item) in wanted else item for item in items]
