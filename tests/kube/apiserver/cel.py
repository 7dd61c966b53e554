"""CEL rules of CRDs (`x-kubernetes-validations`), evaluated by the reference implementation in C++."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from cel_expr_python import cel
from cel_expr_python.ext import ext_bindings, ext_optional, ext_strings

from tests.kube.apiserver.errors import Cause
from tests.kube.apiserver.schema import Node, child
from tests.kube.apiserver.structural import parse_quantity
from tests.kube.apiserver.validation import shown, type_of

_REASONS = {
    "FieldValueInvalid": "Invalid value",
    "FieldValueForbidden": "Forbidden",
    "FieldValueRequired": "Required value",
    "FieldValueDuplicate": "Duplicate value",
}

T = cel.Type


def _quantity_ok(text: str) -> bool:
    try:
        parse_quantity(text)
    except ValueError:
        return False
    return True


def _is_url(text: str) -> bool:
    parts = urlsplit(text)
    return bool(parts.scheme and (parts.netloc or parts.path.startswith("/")))


def _compare(a: float, b: float) -> int:
    return (a > b) - (a < b)


def _function(name: str, result: Any, parameters: list[Any], impl: Any, member: bool = False) -> Any:
    suffix = "_".join(p.name().lower() for p in parameters)
    overload = cel.Overload(
        f"k8s_{name}_{suffix}", return_type=result, parameters=parameters, is_member=member, impl=impl
    )
    return cel.FunctionDecl(name, [overload])


@lru_cache(maxsize=1)
def _functions() -> list[Any]:
    """The functions Kubernetes adds. A quantity is its number, as a double, so `compareTo` takes doubles."""
    ordered = [
        _function("isSorted", T.BOOL, [T.LIST], lambda xs: list(xs) == sorted(xs), member=True),
        _function("sum", T.DYN, [T.LIST], sum, member=True),
        _function("min", T.DYN, [T.LIST], min, member=True),
        _function("max", T.DYN, [T.LIST], max, member=True),
    ]
    quantities = [
        _function("quantity", T.DOUBLE, [T.STRING], lambda s: float(parse_quantity(s))),
        _function("isQuantity", T.BOOL, [T.STRING], _quantity_ok),
        _function("compareTo", T.INT, [T.DOUBLE, T.DOUBLE], _compare, member=True),
        _function("add", T.DOUBLE, [T.DOUBLE, T.DOUBLE], lambda a, b: a + b, member=True),
        _function("sub", T.DOUBLE, [T.DOUBLE, T.DOUBLE], lambda a, b: a - b, member=True),
        _function("isLessThan", T.BOOL, [T.DOUBLE, T.DOUBLE], lambda a, b: a < b, member=True),
        _function("isGreaterThan", T.BOOL, [T.DOUBLE, T.DOUBLE], lambda a, b: a > b, member=True),
        _function("isInteger", T.BOOL, [T.DOUBLE], float.is_integer, member=True),
        _function("asInteger", T.INT, [T.DOUBLE], int, member=True),
        _function("asApproximateFloat", T.DOUBLE, [T.DOUBLE], float, member=True),
    ]
    strings = [
        _function("find", T.STRING, [T.STRING, T.STRING], _find, member=True),
        _function(
            "findAll", T.LIST, [T.STRING, T.STRING], lambda s, p: [m.group() for m in re.finditer(p, s)], member=True
        ),
        _function("isURL", T.BOOL, [T.STRING], _is_url),
    ]
    return [*ordered, *quantities, *strings]


def environment(kind: Any, descriptors: Any = None) -> Any:
    """CEL as Kubernetes has it, with `self` and `oldSelf` of a type (a message's has its descriptor in a pool)."""
    return cel.NewEnv(
        descriptor_pool=descriptors,
        variables={"self": kind, "oldSelf": kind, "hasOldSelf": T.BOOL},
        extensions=[
            ext_optional.ExtOptional(),
            ext_strings.ExtStrings(),
            ext_bindings.ExtBindings(),
        ],
        functions=_functions(),
    )


@lru_cache(maxsize=1)
def _untyped() -> Any:
    return environment(T.DYN)


def _find(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    return match.group() if match else ""


@lru_cache(maxsize=1024)
def compiled(expression: str) -> Any:
    """An expression, to be evaluated. Raises `RuntimeError` for one that is not CEL."""
    return _untyped().compile(expression)


def is_transition(rule: str) -> bool:
    return re.search(r"\boldSelf\b", rule) is not None


def source(rule: dict[str, Any], name: str) -> str:
    """The expression of a rule; with `optionalOldSelf`, the old value is an optional in it."""
    text = str(rule[name])
    if rule.get("optionalOldSelf") and is_transition(text):
        return f"cel.bind(oldSelf, hasOldSelf ? optional.of(oldSelf) : optional.none(), {text})"
    return text


def broken_rules(value: Any, old: Any, node: Node, path: str = "") -> Iterator[Cause]:
    """Every rule a value breaks; rules over `oldSelf` are judged where both the old and the new value exist."""
    if not node.has_rules_below or value is None:
        return
    for rule in node.rules:
        fault = _judge(rule, value, old, path)
        if fault is not None:
            yield fault
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, below in value.items():
            known = child(node, name)
            if known is not None and known.has_rules_below:
                where = f"{path}.{name}" if path else name
                yield from broken_rules(below, before.get(name), known, where)
    elif isinstance(value, list) and node.items is not None:
        for number, item in enumerate(value):
            yield from broken_rules(item, _counterpart(item, old, node), node.items, f"{path}[{number}]")


def _counterpart(item: Any, old: Any, node: Node) -> Any:
    """The old item of a list of list type map; items of other lists have none."""
    if node.list_type != "map" or not isinstance(old, list) or not isinstance(item, dict):
        return None
    keys = [item.get(k) for k in node.list_keys]
    return next((o for o in old if isinstance(o, dict) and [o.get(k) for k in node.list_keys] == keys), None)


def _judge(rule: dict[str, Any], value: Any, old: Any, path: str) -> Cause | None:
    text = rule["rule"]
    if is_transition(text) and old is None and not rule.get("optionalOldSelf"):
        return None
    data = {"self": value, "oldSelf": old, "hasOldSelf": old is not None}
    outcome = compiled(source(rule, "rule")).eval(data=data)
    if outcome.type() == T.BOOL and outcome.value() is True:
        return None
    named = (rule.get("message") or text).strip()
    if outcome.type() == T.ERROR:
        return Cause(path, f'Invalid value: "{type_of(value)}": {_error(outcome)} evaluating rule: {named}')
    where = path
    if field_path := rule.get("fieldPath"):
        where = f"{path}{field_path}" if path else field_path.lstrip(".")
    reason = rule.get("reason", "FieldValueInvalid")
    message = _message(rule, data) or (named if rule.get("message") else f"failed rule: {named}")
    head = _REASONS.get(reason, "Invalid value")
    if reason == "FieldValueInvalid" and not isinstance(value, dict | list):
        head = f"{head}: {shown(value)}"
    return Cause(where, f"{head}: {message}", reason)


def _error(outcome: Any) -> str:
    """What went wrong, in the words of the Go implementation where they differ."""
    text = str(outcome.plain_value()).partition(": ")[2]
    return re.sub(r'Key not found in map : "(.*)"', r"no such key: \1", text).replace(
        "divide by zero", "division by zero"
    )


def _message(rule: dict[str, Any], data: dict[str, Any]) -> str:
    """The text of `messageExpression`; empty where it has none that can be shown."""
    if not rule.get("messageExpression"):
        return ""
    outcome = compiled(source(rule, "messageExpression")).eval(data=data)
    text = str(outcome.plain_value()).strip() if outcome.type() == T.STRING else ""
    return "" if "\n" in text else text
