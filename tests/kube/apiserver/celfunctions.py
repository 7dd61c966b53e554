"""What a call of a CEL function costs at most, and how large its result can be: CEL's own and those Kubernetes adds.

A transcription of `functionCost` of cel-go's `checker/cost.go` and `EstimateCallCost` of Kubernetes 1.36's
`apiserver/pkg/cel/library/cost.go`. Functions that the environment of `cel.py` does not declare have no cost here: an
expression that calls one does not compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.celast import has

MOST = 2**64 - 1
"""Sizes and costs are unsigned 64-bit integers that do not overflow; an unknown size is this."""
CHARACTER, REGEX = 0.1, 0.25

Found = tuple[int, int | None] | None
"""The cost without that of the arguments, and the size of the result; None for a function that costs 1."""


def add(*numbers: int) -> int:
    return min(sum(numbers), MOST)


def multiply(a: int, b: int) -> int:
    return min(a * b, MOST)


def factor(number: int, by: float) -> int:
    """Times a factor, rounded up, in floating point as the server does it."""
    product = math.ceil(float(number) * by)
    return product if product < 2.0**64 else MOST


@dataclass(frozen=True, slots=True)
class Argument:
    """A value that a function is called with."""

    expr: Any
    size: int
    """The most characters, items or entries as far as the expression or its schema says."""
    element: str
    """Kind of a list's items; empty for other values."""
    item: int
    """The most characters of a list's items, as far as the schema says."""


_NOMINAL = frozenset(
    {
        "sign", "asInteger", "isInteger", "asApproximateFloat", "isGreaterThan", "isLessThan", "compareTo", "add",
        "sub",
    }
)  # fmt: skip
_COMPARED = frozenset(
    ["equals", "not_equals"]
    + [
        f"{name}_{kind}"
        for name in ("less", "greater", "less_equals", "greater_equals")
        for kind in ("string", "bytes")
    ]
)


def cost(function: str, overload: str, target: Argument | None, args: Sequence[Argument]) -> Found:
    """What a call costs whose cost depends on sizes."""
    return _library(function, target, args) or _standard(overload, target, args)


def _standard(overload: str, target: Argument | None, args: Sequence[Argument]) -> Found:
    match overload:
        case "string_format" if target:
            return factor(target.size, CHARACTER), None
        case "string_to_bytes":
            return factor(args[0].size, CHARACTER), multiply(args[0].size, 4)
        case "bytes_to_string":
            return factor(args[0].size, CHARACTER), args[0].size
        case "strings_quote":
            return factor(args[0].size, CHARACTER), add(multiply(args[0].size, 2), 2)
        case "starts_with_string" | "ends_with_string":
            return factor(args[0].size, CHARACTER), None
        case "in_list":
            return args[1].size, None
        case "matches_string" if target:
            return _regex(target, args[0]), None
        case "contains_string" if target:
            return multiply(factor(target.size, CHARACTER), factor(args[0].size, CHARACTER)), None
        case "add_list":
            return 1, add(args[0].size, args[1].size)
        case "add_string" | "add_bytes":
            size = add(args[0].size, args[1].size)
            return factor(size, CHARACTER), size
    if overload in _COMPARED:
        return factor(min(args[0].size, args[1].size), CHARACTER), None
    return None


def _library(function: str, target: Argument | None, args: Sequence[Argument]) -> Found:
    match function:
        case "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" if target:
            return _traversal(target), None
        case "lowerAscii" | "upperAscii" | "substring" | "trim" if target:
            return factor(target.size, CHARACTER), target.size
        case "replace" if target and len(args) >= 2:
            return factor(target.size, 2 * CHARACTER), _replaced(target, args[0], args[1])
        case "split" if target:
            limit = args[1].expr if len(args) > 1 else None
            bounded = limit is not None and has(limit, "constant") and has(limit.constant, "int")
            return factor(target.size, 2 * CHARACTER), limit.constant.int % 2**64 if bounded else target.size
        case "join" if target:
            size = _joined(target, args)
            return factor(size, CHARACTER), size
        case "find" | "findAll" if target and args:
            return _regex(target, args[0]), target.size
        case "quantity" | "isQuantity" if args:
            return factor(args[0].size, CHARACTER), None
    return (1, None) if function in _NOMINAL else None


def _regex(text: Argument, pattern: Argument) -> int:
    return multiply(factor(add(text.size, 1), CHARACTER), factor(pattern.size, REGEX))


def _traversal(target: Argument) -> int:
    if not target.element:
        return factor(target.size, CHARACTER)
    each = add(1, factor(target.item, CHARACTER)) if target.element in ("string", "bytes") else 1
    return multiply(target.size, each)


def _joined(target: Argument, args: Sequence[Argument]) -> int:
    size = multiply(target.size, target.item) if target.element else 0
    return add(size, multiply(args[0].size, max(target.size - 1, 0))) if args else size


def _replaced(target: Argument, old: Argument, new: Argument) -> int:
    """The longest result: as many replacements as there can be, of the shortest by the longest."""
    # The least size is known of literals alone.
    literal = has(old.expr, "constant") and has(old.expr.constant, "string")
    shortest = len(old.expr.constant.string) if literal else 0
    if shortest == 0:
        return add(multiply(add(target.size, 1), new.size), target.size)
    if new.size <= shortest:
        return target.size
    return multiply(math.ceil(float(target.size) / float(shortest)), new.size)
