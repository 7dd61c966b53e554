"""What a server does to an object before it validates it: drops unknown fields, fills in defaults, unifies quantities.

Checked against the real server by `test_conformance.py` (custom resources) and `test_conformance_objects.py` (built-in
kinds: what Go leaves out, and quantities).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from tests.kube.apiserver.schema import Node, child


def prune(value: Any, node: Node, path: str = "") -> list[str]:
    """Remove fields the schema does not know, in place; returns their paths."""
    dropped: list[str] = []
    _prune(value, node, path, dropped)
    return dropped


def _prune(value: Any, node: Node, path: str, dropped: list[str]) -> None:
    if isinstance(value, dict):
        if not node.properties and node.additional is None and node.preserve:
            return
        unknown = []
        for name, below in value.items():
            known = child(node, name)
            where = f"{path}.{name}" if path else name
            if known is None:
                unknown.append(name)
                dropped.append(where)
            elif isinstance(below, dict | list):
                _prune(below, known, where, dropped)
        for name in unknown:
            del value[name]
    elif isinstance(value, list) and node.items is not None:
        for number, item in enumerate(value):
            if isinstance(item, dict | list):
                _prune(item, node.items, f"{path}[{number}]", dropped)


def fill_defaults(value: Any, node: Node) -> None:
    """Set every field that is absent and has a default, in place; null counts as absent where it is not allowed."""
    if not node.has_defaults_below:
        return
    if isinstance(value, dict):
        for name, below in node.properties.items():
            if below.has_default and (name not in value or (value[name] is None and not below.nullable)):
                value[name] = plain_copy(below.default)
        for name, below in value.items():
            known = child(node, name)
            if known is not None:
                fill_defaults(below, known)
    elif isinstance(value, list) and node.items is not None:
        for item in value:
            fill_defaults(item, node.items)


def drop_nulls(value: Any, node: Node) -> None:
    """Remove nulls where a custom resource's field may not be null, in place: absent and null mean the same there."""
    if isinstance(value, dict):
        if node.preserve and not node.properties:
            return
        for name in [n for n, v in value.items() if v is None]:
            known = child(node, name)
            if known is not None and not known.preserve and not known.nullable:
                del value[name]
        for name, below in value.items():
            if isinstance(below, dict | list) and (known := child(node, name)) is not None:
                drop_nulls(below, known)
    elif isinstance(value, list) and node.items is not None:
        for item in value:
            drop_nulls(item, node.items)


_ZERO: dict[str, Callable[[], Any]] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}

# What Go leaves out when it is zero, and what not: the published schemas do not tell pointers from values.
_LEFT_OUT = {
    "hostIPC", "hostNetwork", "hostPID", "hostPort", "initialDelaySeconds", "minReadySeconds", "nodePort", "nullable",
    "paused",
    "preserveUnknownFields", "publishNotReadyAddresses", "readOnly", "stdin", "stdinOnce", "tty", "unschedulable",
}  # fmt: skip
_KEPT_STRINGS = {"appProtocol", "hostname", "name", "ipFamilyPolicy", "runtimeClassName", "storageClassName", "zone"}
_KEPT_LISTS = {"rules", "endpoints", "ports", "containers", "addresses", "verbs", "policyTypes"}


def as_go_writes(value: Any, node: Node) -> None:
    """Remove from a built-in object what the server leaves out when it writes it: nulls and most zero values, in place.

    A null in a list is the zero value of its items' type.
    """
    if isinstance(value, dict):
        if node.preserve and not node.properties:
            return
        gone = []
        for name, below in value.items():
            known = child(node, name)
            if known is None or (known.preserve and not known.properties):
                continue
            if isinstance(below, dict | list):
                as_go_writes(below, known)
            if below is None or (not below and name in node.properties and _left_out(name, below, node, known)):
                gone.append(name)
        for name in gone:
            del value[name]
    elif isinstance(value, list) and node.items is not None:
        for number, item in enumerate(value):
            if item is None and node.items.type in _ZERO:
                value[number] = _ZERO[node.items.type]()
            elif isinstance(item, dict | list):
                as_go_writes(item, node.items)


def _left_out(name: str, zero: Any, node: Node, known: Node) -> bool:
    if name in node.required:
        return False
    if isinstance(zero, dict):
        return known.additional is not None
    if isinstance(zero, list):
        return name not in _KEPT_LISTS
    if isinstance(zero, str):
        return name not in _KEPT_STRINGS and not known.int_or_string
    return name in _LEFT_OUT or (name == "priority" and "jsonPath" in node.properties)


def plain_copy(value: Any) -> Any:
    """A copy of plain data that shares nothing with it."""
    if isinstance(value, dict):
        return {name: plain_copy(v) if isinstance(v, dict | list) else v for name, v in value.items()}
    if isinstance(value, list):
        return [plain_copy(v) if isinstance(v, dict | list) else v for v in value]
    return value


_BINARY = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def canonical_quantity(value: Any) -> str:
    """A quantity as the server writes it: `1000m` is `1`, `1024Mi` is `1Gi`, `0.5` is `500m`. Raises `ValueError`.

    Exponents (`1e3`) are not modelled: they become a decimal suffix, which a real server keeps apart.
    """
    text = str(value)
    number = parse_quantity(text)
    if number == 0:
        return "0"
    if text.endswith("i") and number == number.to_integral_value():
        whole, power = int(number), 0
        while whole % 1024 == 0 and power < len(_BINARY):
            whole, power = whole // 1024, power + 1
        if abs(whole) >= 1024 or power or abs(int(number)) < 1024:
            return f"{whole}{_BINARY[power - 1] if power else ''}"
    exponent = 0
    while number != number.to_integral_value() and exponent > -3:
        number, exponent = number * 1000, exponent - 1
    whole = int(number.to_integral_value(rounding="ROUND_UP"))
    while whole % 1000 == 0 and exponent < 6:
        whole, exponent = whole // 1000, exponent + 1
    return f"{whole}{next(s for s, e in _DECIMAL.items() if e == exponent)}"


def canonical_quantities(value: Any, node: Node) -> Any:
    """Rewrite every quantity as the server does, in place (the result is for scalars); malformed ones stay."""
    if not node.has_quantities_below:
        return value
    if node.quantity:
        try:
            return canonical_quantity(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        for name, below in value.items():
            known = child(node, name)
            if known is not None and known.has_quantities_below and below is not None:
                value[name] = canonical_quantities(below, known)
    elif isinstance(value, list) and node.items is not None:
        for item in value:
            canonical_quantities(item, node.items)
    return value
