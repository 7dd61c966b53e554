"""CEL rules of CRDs (`x-kubernetes-validations`), compiled and evaluated by the reference implementation in C++.

Modelled, as Kubernetes 1.36 does it (k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation): each rule is
compiled against the types of its schema; its cost is estimated for the largest value that the schema allows, multiplied
by how often the value can occur, and compared with a budget, rule by rule and in total; `oldSelf` is refused where the
old value of an item is not known; rules are evaluated when an object is written. Checked against the real server by
`test_conformance.py` and `test_conformance_definitions.py`.

Not modelled, and refused: `messageExpression`, `reason` and `optionalOldSelf`; functions beyond CEL's standard library;
what `celcost.py` and `celtypes.py` name; comparisons between numbers of different types. The leniency of a real server
towards rules that an older server stored does not exist here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from tests.kube.apiserver import celcost
from tests.kube.apiserver.celtypes import Declared, Messages, Unmodelled, declared
from tests.kube.apiserver.errors import Cause, unmodelled
from tests.kube.apiserver.schema import Node, child
from tests.kube.apiserver.validation import invalid, required, shown, type_of

Rule = dict[str, Any]

RULE_LIMIT = 10_000_000
"""The most that one expression may cost by the estimate, in CEL's units."""
TOTAL_LIMIT = 100_000_000
"""The most that all of a version's expressions may cost together."""
FIELDS = {"rule", "message", "fieldPath"}
"""The fields of a rule that are modelled."""
ADVICE = (
    "(try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are "
    "declared)"
)
T = cel.Type
_STEP = re.compile(r"\.([A-Za-z_]\w*)")


def _environment(kind: Any, descriptors: Any = None) -> Any:
    """CEL with `self` and `oldSelf` of a type (a message's has its descriptor in a pool)."""
    return cel.NewEnv(descriptor_pool=descriptors, variables={"self": kind, "oldSelf": kind})


@lru_cache(maxsize=1)
def _untyped() -> Any:
    return _environment(T.DYN)


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    """An expression, to be evaluated. Raises `RuntimeError` for one that is not CEL."""
    return _untyped().compile(expression)


def _is_transition(rule: str) -> bool:
    return re.search(r"\boldSelf\b", rule) is not None


# --- rules when an object is written -----------------------------------------------------------------------


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


def _judge(rule: Rule, value: Any, old: Any, path: str) -> Cause | None:
    text = rule["rule"]
    if _is_transition(text) and old is None:
        return None
    outcome = _compiled(text).eval(data={"self": value, "oldSelf": old})
    if outcome.type() == T.BOOL and outcome.value() is True:
        return None
    named = (rule.get("message") or text).strip()
    if outcome.type() == T.ERROR:
        return Cause(path, f'Invalid value: "{type_of(value)}": {_error(outcome)} evaluating rule: {named}')
    where = path
    if field_path := rule.get("fieldPath"):
        where = f"{path}{field_path}" if path else field_path.lstrip(".")
    head = "Invalid value" if isinstance(value, dict | list) else f"Invalid value: {shown(value)}"
    return Cause(where, f"{head}: {named if rule.get('message') else f'failed rule: {named}'}")


def _error(outcome: Any) -> str:
    """What went wrong, in the words of the Go implementation where they differ."""
    text = str(outcome.plain_value()).partition(": ")[2]
    return re.sub(r'Key not found in map : "(.*)"', r"no such key: \1", text)


# --- rules when a CRD is written ---------------------------------------------------------------------------


@dataclass
class _Total:
    cost: int = 0
    expensive: list[tuple[int, str]] = field(default_factory=list)

    def observe(self, cost: int, where: str) -> None:
        self.cost += cost
        if cost >= TOTAL_LIMIT // 100:
            self.expensive = sorted([*self.expensive, (cost, where)], reverse=True)[:4]


@dataclass(frozen=True)
class _Place:
    """Where a schema stands: how often its value can occur (None: unbounded), and what forbids `oldSelf` there."""

    path: str
    cardinality: int | None = 1
    uncorrelatable: str = ""
    resource: bool = False

    def below(self, suffix: str, factor: int | None = 1, *, uncorrelatable: bool = False) -> _Place:
        cardinality = None if self.cardinality is None or factor is None else self.cardinality * factor
        return _Place(f"{self.path}{suffix}", cardinality, self.path if uncorrelatable else self.uncorrelatable)


def check_rules(node: Node, path: str = "", *, resource: bool = False) -> Iterator[Cause]:
    """Faults of the rules of a schema and all below it. `resource`: it is the root of a resource."""
    total = _Total()
    yield from _check(node, _Place(path, resource=resource), total)
    if total.cost > TOTAL_LIMIT:
        for _, where in total.expensive:
            yield _forbidden(where, "contributed to estimated rule cost total exceeding cost limit for entire "
                             "OpenAPIv3 schema")  # fmt: skip
        what = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema"
        yield _forbidden(path, _over(what, total.cost, TOTAL_LIMIT))


def _check(node: Node, place: _Place, total: _Total) -> Iterator[Cause]:
    if not node.has_rules_below:
        return
    for name, below in node.properties.items():
        yield from _check(below, place.below(f".properties[{name}]", uncorrelatable=node.atomic_map), total)
    if node.items is not None:
        at = place.below(".items", node.facets.get("maxItems"), uncorrelatable=node.list_type != "map")
        yield from _check(node.items, at, total)
    if node.additional is not None:
        yield from _check(node.additional, place.below(".additionalProperties", None), total)
    if not node.rules:
        return
    kind = declared(node, resource=place.resource)
    if kind is None:
        yield Cause(f"{place.path}.x-kubernetes-validations", "Internal error: failed to construct type information "
                    "for x-kubernetes-validations rules", "InternalError")  # fmt: skip
        return
    for number, rule in enumerate(node.rules):
        where = f"{place.path}.x-kubernetes-validations[{number}]"
        wrong = list(_written(rule, where, node))
        yield from wrong or _compiles_within_budget(rule, where, kind, place, total)


def _written(rule: Rule, where: str, node: Node) -> Iterator[Cause]:
    """Faults of a rule's other fields, without which it is not compiled."""
    for name in rule.keys() - FIELDS:
        yield unmodelled(f"{where}.{name}", f"{name} of a rule")
    if not rule.get("rule", "").strip():
        yield required(f"{where}.rule", "rule is not specified")
    if re.search(r"[\n\r]", rule.get("message", "").strip()):
        yield invalid(f"{where}.message", rule["message"], "must not contain line breaks")
    if (path := rule.get("fieldPath")) and not _leads_somewhere(path, node):
        yield invalid(f"{where}.fieldPath", path, "must be a valid path")


def _leads_somewhere(path: str, node: Node) -> bool:
    """Whether a rule's fieldPath names a declared field; it cannot lead through a list."""
    at: Node | None = node
    position = 0
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None or at is None or at.type != "object":
            return False
        at = child(at, step.group(1))
        position = step.end()
    return at is not None


def _compiles_within_budget(rule: Rule, where: str, kind: Declared, place: _Place, total: _Total) -> Iterator[Cause]:
    text = rule["rule"]
    try:
        cost = celcost.estimate(checked(text, kind), kind)
    except NotAnExpression as fault:
        yield invalid(f"{where}.rule", text, str(fault))
        return
    except Unmodelled as fault:
        yield unmodelled(f"{where}.rule", str(fault))
        return
    cost *= kind.cardinality if place.cardinality is None else place.cardinality
    total.observe(cost, f"{where}.rule")
    if cost > RULE_LIMIT:
        yield _forbidden(f"{where}.rule", _over("estimated rule cost", cost, RULE_LIMIT))
    if _is_transition(text) and place.uncorrelatable:
        why = f"oldSelf cannot be used on the uncorrelatable portion of the schema within {place.uncorrelatable}"
        yield invalid(f"{where}.rule", text, why)


class NotAnExpression(Exception):
    """A rule does not compile, or is not of type bool."""


def checked(text: str, kind: Declared) -> celcost.Tree:
    """The tree of a rule over a type. Raises `NotAnExpression` and `Unmodelled`."""
    messages = Messages(kind)
    try:
        expression = _environment(T(messages.root), messages.pool).compile(text)
        _compiled(text)  # what is evaluated is compiled without types
    except RuntimeError as error:
        why = str(error).removesuffix(" [INVALID_ARGUMENT]").removeprefix("INVALID_ARGUMENT: ")
        raise NotAnExpression(f"compilation failed: {why}") from None
    if expression.return_type() != T.BOOL:
        raise NotAnExpression("cel expression must evaluate to a bool")
    return celcost.read(expression.serialize())


def _forbidden(where: str, why: str) -> Cause:
    return Cause(where, f"Forbidden: {why}", "FieldValueForbidden")


def _over(what: str, cost: int, limit: int) -> str:
    factor = min(cost, celcost.MOST) / limit
    shown = "more than 100x" if factor > 100 else f"{factor:.6f}x" if factor < 1.5 else f"{factor:.1f}x"
    return f"{what} exceeds budget by factor of {shown} {ADVICE}"
