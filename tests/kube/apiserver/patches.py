"""JSON patch, merge patch and strategic merge patch."""

from __future__ import annotations

from typing import Any

from tests.kube.apiserver.errors import ApiError, bad_request
from tests.kube.apiserver.schema import Node, child
from tests.kube.apiserver.structural import plain_copy


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


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise bad_request(f"not a JSON pointer: {text!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _unprocessable(why: str) -> ApiError:
    return ApiError(422, f"the server rejected our request due to an error in our request: {why}", "Invalid", {})


def _step(parent: Any, key: str, what: str) -> Any:
    try:
        return parent[int(key)] if isinstance(parent, list) else parent[key]
    except (KeyError, IndexError, ValueError, TypeError):
        raise _unprocessable(f"{what} operation does not apply: doc is missing path") from None


def _get(document: Any, path: list[str], what: str) -> Any:
    for key in path:
        document = _step(document, key, what)
    return document


def _add(document: Any, path: list[str], value: Any, *, replace: bool = False) -> Any:
    if not path:
        return value
    what = "replace" if replace else "add"
    parent = _get(document, path[:-1], what)
    key = path[-1]
    if isinstance(parent, list):
        if replace:
            _step(parent, key, what)
            parent[int(key)] = value
        elif key == "-":
            parent.append(value)
        elif key.lstrip("-").isdigit() and int(key) <= len(parent):
            parent.insert(int(key), value)
        else:
            raise _unprocessable("add operation does not apply: index out of bounds")
    elif isinstance(parent, dict):
        if replace:
            _step(parent, key, what)
        parent[key] = value
    else:
        raise _unprocessable(f"{what} operation does not apply: doc is missing path")
    return document


def _remove(document: Any, path: list[str]) -> Any:
    parent = _get(document, path[:-1], "remove")
    _step(parent, path[-1], "remove")
    if isinstance(parent, list):
        del parent[int(path[-1])]
    else:
        del parent[path[-1]]
    return document


def json_patch(document: Any, operations: Any) -> Any:
    """RFC 6902, in place. Raises `ApiError` where an operation does not apply."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    for operation in operations:
        path = _pointer(operation.get("path", ""))
        match operation.get("op"):
            case "add":
                document = _add(document, path, operation["value"])
            case "replace":
                document = _add(document, path, operation["value"], replace=True)
            case "remove":
                document = _remove(document, path)
            case "test":
                if _get(document, path, "test") != operation.get("value"):
                    raise _unprocessable(f"testing value {operation['path']} failed")
            case "copy":
                document = _add(document, path, plain_copy(_get(document, _pointer(operation["from"]), "copy")))
            case "move":
                source = _pointer(operation["from"])
                value = _get(document, source, "move")
                document = _add(_remove(document, source), path, value)
            case other:
                raise bad_request(f"unknown operation {other!r}")
    return document


def strategic_merge(target: Any, patch: dict[str, Any], node: Node) -> Any:
    """A strategic merge patch: lists merge by the keys the schema names. The target is changed in place."""
    if not isinstance(target, dict):
        target = {}
    directive = patch.get("$patch")
    if directive == "replace":
        return {k: plain_copy(v) for k, v in patch.items() if k != "$patch"}
    if directive == "delete":
        return {}
    keep = patch.get("$retainKeys")
    for name, value in patch.items():
        if name.startswith("$setElementOrder/"):
            continue
        if name.startswith("$deleteFromPrimitiveList/"):
            listed = name.partition("/")[2]
            target[listed] = [item for item in target.get(listed) or [] if item not in value]
        elif name.startswith("$"):
            continue
        else:
            _merge_field(target, name, value, child(node, name))
    for name, order in patch.items():
        if name.startswith("$setElementOrder/"):
            listed = name.partition("/")[2]
            known = child(node, listed)
            if known is not None and isinstance(target.get(listed), list):
                target[listed] = _ordered(target[listed], order, known.merge_key)
    if keep is not None:
        target = {k: v for k, v in target.items() if k in keep}
    return target


def _merge_field(target: dict[str, Any], name: str, value: Any, node: Node | None) -> None:
    if value is None:
        target.pop(name, None)
    elif isinstance(value, dict) and node is not None:
        if value.get("$patch") == "delete":
            target.pop(name, None)
        else:
            target[name] = strategic_merge(target.get(name), value, node)
    elif isinstance(value, list) and node is not None and node.merge_key:
        target[name] = _merge_list(target.get(name) or [], value, node)
    else:
        target[name] = plain_copy(value)


def _merge_list(old: list[Any], patch: list[Any], node: Node) -> list[Any]:
    key = node.merge_key
    if key == "*":
        return [*old, *(item for item in patch if item not in old)]
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
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
