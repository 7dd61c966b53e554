"""What a CEL rule can cost at most, by Kubernetes' own estimate, which decides whether a CRD is accepted.

Modelled: a transcription of cel-go's `checker/cost.go` and of `EstimateCallCost` in Kubernetes 1.36's
`apiserver/pkg/cel/library/cost.go`, of which the upper bound is kept, for that alone is compared with a budget. Checked
against costs that Kubernetes' own code computed (`tests/data/kubernetes/cel-costs.json`) and, as all of `cel.py`, by
`test_conformance_definitions.py`.

Not modelled, and refused by `Unmodelled`: expressions and functions that no rule of the product uses (macros,
concatenation, comparison of strings by order, maps and messages as literals). The budget for evaluating a rule on an
object (1,000,000 a rule and 10,000,000 an object) does not exist here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.celtypes import Declared, Unmodelled
from tests.kube.apiserver.protobuf import message_classes

MOST = 2**64 - 1
"""Sizes and costs are unsigned 64-bit integers that do not overflow; an unknown size is this."""
CHARACTER, REGEX = 0.1, 0.25
LIST = 10

# The compiler's serialized `cel.expr.CheckedExpr`, as far as it is read: field numbers are those of cel-spec's
# `checked.proto` and `syntax.proto`.
_MESSAGES = {
    "Any": "2value:Checked",
    "Checked": "2*references:Referred 3*types:Typed 4expr:Expr",
    "Referred": "1id:i 2value:Reference",
    "Reference": "3*overloads:s",
    "Typed": "1id:i 2value:Type",
    "Type": "3primitive:e 5known:e 7map:Empty 9message:s",
    "Empty": "",
    "Expr": "2id:i 3constant:Constant 4ident:Ident 5select:Select 6call:Call 7list:List",
    "Constant": "1null:e 2bool:b 3int:i 4uint:u 5double:d 6string:s",
    "Ident": "1name:s",
    "Select": "1operand:Expr 2field:s 3test_only:b",
    "Call": "1target:Expr 2function:s 3*args:Expr",
    "List": "1*elements:Expr",
}
_STRING = 5
"""The first of the primitive types whose values have a size; bytes follow."""

# What costs 1 beside its arguments, and makes a value of no size.
_CONSTANT = re.compile(
    r"logical_not|size_(string|list|map)|(string|list|map)_size|index_list|"
    r"(less|less_equals|greater|greater_equals|add|subtract|multiply|divide)_(int64|double)"
)

_CHECKED = message_classes(_MESSAGES)["Any"]


@dataclass(frozen=True)
class Tree:
    """An expression with what the checker found out about its parts, by their ids."""

    expr: Any
    types: Mapping[int, Any]
    overloads: Mapping[int, tuple[str, ...]]


def read(serialized: bytes) -> Tree:
    """The tree of a compiled expression."""
    checked = _CHECKED.FromString(serialized).value
    return Tree(
        checked.expr,
        {typed.id: typed.value for typed in checked.types},
        {referred.id: tuple(referred.value.overloads) for referred in checked.references},
    )


def estimate(tree: Tree, root: Declared) -> int:
    """The most that a rule over `self` (and `oldSelf`) of a type can cost. Raises `Unmodelled`."""
    return _Coster(tree, root).cost(tree.expr)


def add(*numbers: int) -> int:
    return min(sum(numbers), MOST)


def _times(number: int, by: float) -> int:
    """Times a factor, rounded up, in floating point as the server does it."""
    product = math.ceil(float(number) * by)
    return product if product < 2.0**64 else MOST


class _Coster:
    def __init__(self, tree: Tree, root: Declared) -> None:
        self._tree = tree
        self._root = root

    def cost(self, expr: Any) -> int:
        match _kind(expr):
            case "constant":
                return 0
            case "ident":
                return 1
            case "select":
                return self._select(expr.select)
            case "list":
                return add(*map(self.cost, expr.list.elements), LIST)
            case "call":
                return self._call(expr)
        raise Unmodelled("a macro, or a map or message as literal, in a rule")

    def _select(self, select: Any) -> int:
        cost = self.cost(select.operand)
        if select.test_only:
            return cost  # Kubernetes does not charge for `has`
        of = self._tree.types.get(select.operand.id)
        return add(cost, 1) if of is not None and (of.HasField("map") or of.HasField("message")) else cost

    def _call(self, expr: Any) -> int:
        call = expr.call
        parts = [*([call.target] if call.HasField("target") else ()), *call.args]
        own = [self._own(overload, parts) for overload in self._tree.overloads.get(expr.id, ())]
        return add(*map(self.cost, parts), max(own, default=0))

    def _own(self, overload: str, parts: list[Any]) -> int:
        """The cost of a call beside that of its target and arguments."""
        match overload:
            case "logical_and" | "logical_or":
                return 0
            case "in_list":
                return self._size(parts[1])
            case "matches_string":
                text, pattern = map(self._size, parts)
                return min(_times(add(text, 1), CHARACTER) * _times(pattern, REGEX), MOST)
            case "equals" | "not_equals":
                return _times(min(map(self._size, parts)), CHARACTER)
        if _CONSTANT.fullmatch(overload):
            return 1
        raise Unmodelled(f"{overload} in a rule")

    def _size(self, expr: Any) -> int:
        """The most characters, items or entries that a value can have."""
        match _kind(expr):
            case "constant":
                return len(expr.constant.string) if expr.constant.HasField("string") else 1
            case "list":
                return len(expr.list.elements)
        if (declared := self._declared(expr)) is not None:
            return declared.most
        of = self._tree.types.get(expr.id)
        scalar = of is not None and (of.known == 2 or (of.HasField("primitive") and of.primitive < _STRING))
        return 1 if scalar else MOST

    def _declared(self, expr: Any) -> Declared | None:
        """What the schema says of a value: of a variable (which is `self` to the estimate), a field, or an item."""
        match _kind(expr):
            case "ident":
                return self._root
            case "select" if (owner := self._declared(expr.select.operand)) is not None:
                return owner.fields.get(expr.select.field)
            case "call" if "index_list" in self._tree.overloads.get(expr.id, ()):
                owner = self._declared(expr.call.args[0])
                return owner.element if owner is not None else None
        return None


def _kind(expr: Any) -> str:
    """constant, ident, select, call or list; empty for anything else."""
    return next((name for name in ("constant", "ident", "select", "call", "list") if expr.HasField(name)), "")
