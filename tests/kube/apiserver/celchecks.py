"""What an API server checks of the rules of a CRD when it is written: that they compile, and what they can cost.

As Kubernetes 1.36 does it (k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation): each rule is compiled
against the types of its schema, its cost is estimated for the largest value that the schema allows and multiplied by
how often the value can occur, and rule by rule and in total compared with a budget. `tests/kube/test_cel_costs.py`
holds the estimates to figures of the real code.

Refused here though a real server might take it (`Unsupported`, or an error of the compiler): a list or map directly
inside a list or map; functions that `cel.py` does not declare (`ip`, `cidr`, `format`, `semver`, `url`, the
authorizer's, `indexOf` of a list, `findAll` with a limit); comparisons between numbers of different types. Not
modelled: the cost of evaluating a rule on an object (1,000,000 a rule and 10,000,000 an object), and the leniency
towards rules that were stored by an older server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.kube.apiserver import celast, celcost
from tests.kube.apiserver.cel import T, compiled, environment, is_transition, source
from tests.kube.apiserver.celtypes import Declared, Messages, Unsupported, declared
from tests.kube.apiserver.errors import Cause
from tests.kube.apiserver.schema import Node, child
from tests.kube.apiserver.validation import invalid, required, unsupported

Rule = dict[str, Any]

RULE_LIMIT = 10_000_000
"""The most that one expression may cost by the estimate, in CEL's units."""
TOTAL_LIMIT = 100_000_000
"""The most that all of a version's expressions may cost together."""
_REASONS = ["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"]
_ADVICE = (
    "(try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are "
    "declared)"
)


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
        yield from _check(
            node.additional, place.below(".additionalProperties", node.facets.get("maxProperties")), total
        )
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
    text, message = rule.get("rule", "").strip(), rule.get("message", "")
    if not text:
        yield required(f"{where}.rule", "rule is not specified")
    elif message and not message.strip():
        yield invalid(f"{where}.message", message, "must be non-empty if specified")
    elif re.search(r"[\n\r]", message.strip()):
        yield invalid(f"{where}.message", message, "must not contain line breaks")
    elif re.search(r"[\n\r]", text) and not message.strip():
        yield required(f"{where}.message", "message must be specified if rule contains line breaks")
    if rule.get("messageExpression") and not rule["messageExpression"].strip():
        yield required(f"{where}.messageExpression", "messageExpression must be non-empty if specified")
    if rule.get("reason") and rule["reason"] not in _REASONS:
        yield unsupported(f"{where}.reason", rule["reason"], list(_REASONS))
    if (path := rule.get("fieldPath")) and not _leads_somewhere(path, node):
        yield invalid(f"{where}.fieldPath", path, "must be a valid path")


_STEP = re.compile(r"\.([A-Za-z_]\w*)|\['((?:[^'\\]|\\.)+)'\]")


def _leads_somewhere(path: str, node: Node) -> bool:
    """Whether a rule's fieldPath names a declared field; it cannot lead through a list."""
    at: Node | None = node
    position = 0
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None or at is None or at.type != "object":
            return False
        at = child(at, step.group(1) or step.group(2))
        position = step.end()
    return at is not None


def _compiles_within_budget(
    rule: Rule, where: str, kind: Declared, place: _Place, total: _Total
) -> Iterator[Cause]:  # fmt: skip
    times = kind.cardinality if place.cardinality is None else place.cardinality
    for name, factor in (("rule", times), ("messageExpression", 1)):
        if not rule.get(name):
            continue
        try:
            tree = checked(rule, name, kind)
        except (NotAnExpression, Unsupported) as fault:
            yield invalid(f"{where}.{name}", rule[name], str(fault))
            return
        cost = celcost.estimate(tree, kind) * factor
        total.observe(cost, f"{where}.{name}")
        if cost > RULE_LIMIT:
            yield _forbidden(f"{where}.{name}", _over(f"estimated {name} cost", cost, RULE_LIMIT))
    if is_transition(rule["rule"]):
        if place.uncorrelatable:
            why = f"oldSelf cannot be used on the uncorrelatable portion of the schema within {place.uncorrelatable}"
            yield invalid(f"{where}.rule", rule["rule"], why)
    elif "optionalOldSelf" in rule:
        yield invalid(
            f"{where}.optionalOldSelf", rule["optionalOldSelf"], "may not be set if oldSelf is not used in rule"
        )


_NOT_KUBERNETES = frozenset({"string_reverse"})
"""Overloads of newer versions of CEL's extensions than Kubernetes has."""


class NotAnExpression(Exception):
    """An expression does not compile, or is of another type than it must be."""


_RESULTS = {"rule": T.BOOL, "messageExpression": T.STRING}


def checked(rule: Rule, name: str, kind: Declared) -> celast.Tree:
    """The tree of a `rule` or its `messageExpression`. Raises `NotAnExpression` and `Unsupported`."""
    wanted = _RESULTS[name]
    prefix = "" if name == "rule" else "messageExpression "
    text = source(rule, name)
    if re.search(r"\bcel\s*\.\s*bind\b", rule[name]):
        # Kubernetes has it not; here it serves to declare an optional `oldSelf`.
        raise NotAnExpression(f"{prefix}compilation failed: ERROR: undeclared reference to 'cel' (in container '')")
    messages = Messages(kind)
    try:
        expression = environment(T(messages.root), messages.pool).compile(text)
        compiled(text)  # what is evaluated is compiled without types
    except RuntimeError as error:
        why = str(error).removesuffix(" [INVALID_ARGUMENT]").removeprefix("INVALID_ARGUMENT: ")
        raise NotAnExpression(f"{prefix}compilation failed: {why}") from None
    if expression.return_type() != wanted:
        subject = "cel expression" if name == "rule" else "messageExpression"
        raise NotAnExpression(f"{subject} must evaluate to a {wanted.name().lower()}")
    tree = celast.read(expression.serialize())
    if unknown := _NOT_KUBERNETES & {overload for overloads in tree.overloads.values() for overload in overloads}:
        raise NotAnExpression(f"{prefix}compilation failed: ERROR: found no matching overload for '{min(unknown)}'")
    if text != rule[name]:
        # `oldSelf` is bound to an optional around it, which a real server declares as such: that costs nothing.
        return celast.Tree(tree.expr.comprehension.result, tree.types, tree.overloads)
    return tree


def _forbidden(where: str, why: str) -> Cause:
    return Cause(where, f"Forbidden: {why}", "FieldValueForbidden")


def _over(what: str, cost: int, limit: int) -> str:
    factor = min(cost, celcost.MOST) / limit
    shown = "more than 100x" if factor > 100 else f"{factor:.6f}x" if factor < 1.5 else f"{factor:.1f}x"
    return f"{what} exceeds budget by factor of {shown} {_ADVICE}"
