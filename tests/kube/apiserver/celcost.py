"""What a CEL expression can cost at most, by Kubernetes' own estimate, which decides whether a CRD is accepted.

A transcription of cel-go's `checker/cost.go` and of Kubernetes 1.36's `apiserver/pkg/cel/library/cost.go`, of which
only the upper bound is kept, for that alone is compared with a budget. Functions that the environment of `cel.py` does
not declare have no cost here: an expression that calls one does not compile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.celast import Tree, has, kind
from tests.kube.apiserver.celtypes import Declared

MOST = 2**64 - 1
"""Sizes and costs are unsigned 64-bit integers that do not overflow; an unknown size is this."""
_CHARACTER, _REGEX = 0.1, 0.25
_LIST, _MAP, _STRUCT = 10, 30, 40
_NOMINAL = frozenset(
    ["sign", "asInteger", "isInteger", "asApproximateFloat", "isGreaterThan", "isLessThan", "compareTo", "add", "sub"]
)
_COMPARED = frozenset(
    ["equals", "not_equals"]
    + [
        f"{name}_{kind}"
        for name in ("less", "greater", "less_equals", "greater_equals")
        for kind in ("string", "bytes")
    ]
)
_SCALARS = frozenset({"bool", "double", "duration", "int", "timestamp", "uint"})
_ACCUMULATORS = ("__result__", "@result")

Path = tuple[str, ...]


def _add(*numbers: int) -> int:
    return min(sum(numbers), MOST)


def _multiply(a: int, b: int) -> int:
    return min(a * b, MOST)


def _factor(number: int, factor: float) -> int:
    """Times a factor, rounded up, in floating point as the server does it."""
    product = math.ceil(float(number) * factor)
    return product if product < 2.0**64 else MOST


@dataclass(frozen=True, slots=True)
class _Entry:
    """Sizes of the keys and values of a list or map that an expression makes."""

    container: str
    key: int
    value: int

    def union(self, other: _Entry) -> _Entry:
        return _Entry(self.container, max(self.key, other.key), max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path
    size: int | None
    entry: _Entry | None


@dataclass(frozen=True, slots=True)
class _Argument:
    """A value that a function is called with."""

    expr: Any
    kind: str
    element: str
    """Kind of a list's items; empty for other values."""
    path: Path
    size: int | None


def estimate(tree: Tree, root: Declared) -> int:
    """The most an expression over `self` of a type can cost."""
    return _Coster(tree, root).cost(tree.expr)


class _Coster:
    def __init__(self, tree: Tree, root: Declared) -> None:
        self._tree = tree
        self._root = root
        self._paths: dict[int, Path] = {}
        self._sizes: dict[int, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._locals: dict[str, list[_Local]] = {}

    # --- expressions ---------------------------------------------------------------------------------------

    def cost(self, expr: Any) -> int:
        match kind(expr):
            case "ident":
                found = self._local(expr.ident.name)
                self._paths[expr.id] = found.path if found else (expr.ident.name,)
                return 1
            case "select":
                return self._select(expr)
            case "call":
                return self._call(expr)
            case "list":
                return self._list(expr)
            case "map":
                return self._map(expr)
            case "struct":
                return _add(*(self.cost(entry.value) for entry in expr.struct.entries), _STRUCT)
            case "comprehension":
                return self._bind(expr) if _is_bind(expr.comprehension) else self._comprehension(expr)
        return 0

    def _select(self, expr: Any) -> int:
        operand = expr.select.operand
        cost = self.cost(operand)
        if expr.select.test_only:
            return _add(cost, 1)
        self._paths[expr.id] = (*self._path(operand), expr.select.field)
        return _add(cost, 1) if self._kind(operand) in ("map", "struct", "param") else cost

    def _list(self, expr: Any) -> int:
        cost, item = 0, 0
        for element in expr.list.elements:
            cost = _add(cost, self.cost(element))
            item = max(item, self._size_or_most(element))
        self._entries[expr.id] = _Entry("list", 1, item)
        return _add(cost, _LIST)

    def _map(self, expr: Any) -> int:
        cost, key, value = 0, 0, 0
        for entry in expr.struct.entries:
            cost = _add(cost, self.cost(entry.map_key), self.cost(entry.value))
            key, value = max(key, self._size_or_most(entry.map_key)), max(value, self._size_or_most(entry.value))
        self._entries[expr.id] = _Entry("map", key, value)
        return _add(cost, _MAP)

    def _comprehension(self, expr: Any) -> int:
        loop = expr.comprehension
        cost = _add(self.cost(loop.iter_range), self.cost(loop.accu_init))
        self._push(loop.accu_var, self._of(loop.accu_init))
        entry = self._entry(loop.iter_range)
        listed = (entry.container if entry else self._kind(loop.iter_range)) == "list"
        path = self._path(loop.iter_range)
        keys = _Local((*path, "@indices" if listed else "@keys"), entry and entry.key, None)
        values = _Local((*path, "@items" if listed else "@values"), entry and entry.value, None)
        if loop.iter_var2:
            variables = {loop.iter_var: keys, loop.iter_var2: values}
        else:
            variables = {loop.iter_var: values if listed else keys}
        for name, local in variables.items():
            self._push(name, local)
        once = _add(self.cost(loop.loop_condition), self.cost(loop.loop_step))
        for name in variables:
            self._locals[name].pop()
        cost = _add(cost, self.cost(loop.result))
        self._locals[loop.accu_var].pop()
        times = self._size_or_most(loop.iter_range)
        match kind(loop.accu_init):
            case "constant":
                self._set(expr, self._size(loop.accu_init))
            case "list" | "map":
                self._set(expr, times)
                if (step := self._entry(loop.loop_step)) is not None:
                    self._entries[expr.id] = step
        return _add(cost, _multiply(times, once))

    def _bind(self, expr: Any) -> int:
        bind = expr.comprehension
        cost = _add(self.cost(bind.iter_range), self.cost(bind.accu_init))
        self._push(bind.accu_var, self._of(bind.accu_init))
        cost = _add(cost, self.cost(bind.result))
        self._locals[bind.accu_var].pop()
        self._copy(expr, bind.result)
        return cost

    # --- calls ---------------------------------------------------------------------------------------------

    def _call(self, expr: Any) -> int:
        call = expr.call
        if call.function == "dyn":
            cost = _add(1, self.cost(call.args[0]))
            self._copy(expr, call.args[0])
            return cost
        costs, arguments = [], []
        for argument in call.args:
            costs.append(self.cost(argument))
            arguments.append(self._argument(argument))
        overloads = self._tree.overloads.get(expr.id, ())
        if not overloads:
            return 0
        cost, target = 0, None
        if has(call, "target"):
            cost = self.cost(call.target)
            target = self._argument(call.target)
        most, size = 0, None
        for overload in overloads:
            mine, result = self._function(expr, overload, target, arguments, costs)
            most = max(most, mine)
            if result is not None:
                size = result if size is None else max(size, result)
            if overload in ("index_list", "index_map") and arguments:
                entry = self._entry(arguments[0].expr)
                size = entry.value if entry else None
                item = "@items" if overload == "index_list" else "@values"
                self._paths[expr.id] = (*self._path(arguments[0].expr), item)
            if size is None:
                size = self._size(expr)
        self._set(expr, size)
        return _add(cost, most)

    def _function(
        self, expr: Any, overload: str, target: _Argument | None, args: Sequence[_Argument], costs: Sequence[int]
    ) -> tuple[int, int | None]:
        """The cost of a call, its arguments' included, and the size of its result."""
        found = self._library(expr.call.function, target, args) or self._standard(expr, overload, target, args)
        if found is not None:
            return _add(found[0], *costs), found[1]
        if overload in ("logical_and", "logical_or"):
            return _add(*costs), None
        if overload == "conditional":
            one, other = self._entry(args[1].expr), self._entry(args[2].expr)
            if one is not None and other is not None:
                self._entries[expr.id] = one.union(other)
            return _add(costs[0], max(costs[1], costs[2])), max(_most(args[1]), _most(args[2]))
        return _add(1, *costs), None

    def _standard(
        self, expr: Any, overload: str, target: _Argument | None, args: Sequence[_Argument]
    ) -> tuple[int, int | None] | None:
        """CEL's own functions that take longer for larger values."""
        match overload:
            case "string_format" if target:
                return _factor(_most(target), _CHARACTER), None
            case "string_to_bytes":
                return _factor(_most(args[0]), _CHARACTER), _multiply(_most(args[0]), 4)
            case "bytes_to_string":
                return _factor(_most(args[0]), _CHARACTER), _most(args[0])
            case "strings_quote":
                return _factor(_most(args[0]), _CHARACTER), _add(_multiply(_most(args[0]), 2), 2)
            case "starts_with_string" | "ends_with_string":
                return _factor(_most(args[0]), _CHARACTER), None
            case "in_list":
                return _most(args[1]), None
            case "matches_string" if target:
                return _regex(target, args[0]), None
            case "contains_string" if target:
                return _multiply(_factor(_most(target), _CHARACTER), _factor(_most(args[0]), _CHARACTER)), None
            case "add_string" | "add_bytes" | "add_list":
                size = _add(_most(args[0]), _most(args[1]))
                one, other = self._entry(args[0].expr), self._entry(args[1].expr)
                if one is not None and other is not None:
                    self._entries[expr.id] = one.union(other)
                return 1 if overload == "add_list" else _factor(size, _CHARACTER), size
        if overload in _COMPARED:
            return _factor(min(_most(args[0]), _most(args[1])), _CHARACTER), None
        return None

    def _library(
        self, function: str, target: _Argument | None, args: Sequence[_Argument]
    ) -> tuple[int, int | None] | None:
        """The functions that Kubernetes adds or counts otherwise."""
        match function:
            case "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" if target:
                return self._traversal(target), None
            case "lowerAscii" | "upperAscii" | "substring" | "trim" if target:
                return _factor(self._estimated(target), _CHARACTER), self._estimated(target)
            case "replace" if target and len(args) >= 2:
                return _factor(self._estimated(target), 2 * _CHARACTER), self._replaced(target, args[0], args[1])
            case "split" if target:
                most = self._estimated(target)
                limit = args[1].expr if len(args) > 1 else None
                if limit is not None and has(limit, "constant") and has(limit.constant, "int"):
                    most = limit.constant.int % 2**64
                return _factor(self._estimated(target), 2 * _CHARACTER), most
            case "join" if target:
                size = self._joined(target, args)
                return _factor(size, _CHARACTER), size
            case "find" | "findAll" if target and args:
                size = self._estimated(target)
                characters = _factor(_add(size, 1), _CHARACTER)
                return _multiply(characters, _factor(self._estimated(args[0]), _REGEX)), size
            case "quantity" | "isQuantity" if args:
                return _factor(self._estimated(args[0]), _CHARACTER), None
        return (1, None) if function in _NOMINAL else None

    def _traversal(self, target: _Argument) -> int:
        if not target.element:
            return _factor(self._estimated(target), _CHARACTER)
        each = 1
        if target.element in ("string", "bytes"):
            each = _add(1, _factor(self._item(target), _CHARACTER))
        return _multiply(self._estimated(target), each)

    def _joined(self, target: _Argument, args: Sequence[_Argument]) -> int:
        items = self._estimated(target)
        size = _multiply(items, self._item(target)) if target.element else 0
        if args:
            size = _add(size, _multiply(self._estimated(args[0]), max(items - 1, 0)))
        return size

    def _replaced(self, target: _Argument, old: _Argument, new: _Argument) -> int:
        """The longest result: as many replacements as there can be, of the shortest by the longest."""
        size = self._estimated(target)
        shortest = self._shortest(old)
        if shortest == 0:
            return _add(_multiply(_add(size, 1), self._estimated(new)), size)
        if self._estimated(new) <= shortest:
            return size
        return _multiply(math.ceil(float(size) / float(shortest)), self._estimated(new))

    def _shortest(self, argument: _Argument) -> int:
        """The least size: known of literals alone."""
        literal = argument.expr
        return len(literal.constant.string) if has(literal, "constant") and has(literal.constant, "string") else 0

    def _item(self, target: _Argument) -> int:
        found = self._declared_size((*target.path, "@items")) if target.path else None
        return MOST if found is None else found

    def _estimated(self, argument: _Argument) -> int:
        if argument.size is not None:
            return argument.size
        found = self._declared_size(argument.path)
        return MOST if found is None else found

    # --- what is known of a value -------------------------------------------------------------------------

    def _argument(self, expr: Any) -> _Argument:
        path = self._path(expr)
        if path and path[0] in _ACCUMULATORS:
            path = ()
        declared = self._tree.types.get(expr.id)
        element = _kind(declared.list.element) if declared is not None and has(declared, "list") else ""
        return _Argument(expr, self._kind(expr), element, path, self._size(expr))

    def _of(self, expr: Any) -> _Local:
        return _Local(self._path(expr), self._size(expr), self._entry(expr))

    def _kind(self, expr: Any) -> str:
        declared = self._tree.types.get(expr.id)
        return "dyn" if declared is None else _kind(declared)

    def _path(self, expr: Any) -> Path:
        if has(expr, "ident") and (found := self._local(expr.ident.name)) is not None:
            return found.path
        return self._paths.get(expr.id, ())

    def _local(self, name: str) -> _Local | None:
        stack = self._locals.get(name)
        return stack[-1] if stack else None

    def _push(self, name: str, local: _Local) -> None:
        self._locals.setdefault(name, []).append(local)

    def _set(self, expr: Any, size: int | None) -> None:
        if size is not None:
            self._sizes[expr.id] = size

    def _copy(self, to: Any, source: Any) -> None:
        self._set(to, self._size(source))
        if (entry := self._entry(source)) is not None:
            self._entries[to.id] = entry

    def _entry(self, expr: Any) -> _Entry | None:
        if expr.id in self._entries:
            return self._entries[expr.id]
        found = self._local(expr.ident.name) if has(expr, "ident") else None
        return found.entry if found else None

    def _size_or_most(self, expr: Any) -> int:
        found = self._size(expr)
        return MOST if found is None else found

    def _size(self, expr: Any) -> int | None:
        if expr.id in self._sizes:
            return self._sizes[expr.id]
        if (literal := _literal_size(expr)) is not None:
            return literal
        if (declared := self._declared_size(self._path(expr))) is not None:
            self._sizes[expr.id] = declared
            return declared
        if _is_scalar(self._tree.types.get(expr.id)):
            return 1
        found = self._local(expr.ident.name) if has(expr, "ident") else None
        return found.size if found else None

    def _declared_size(self, path: Path) -> int | None:
        """The most characters, items or entries at a path below a variable (which is `self` for the estimate)."""
        if not path:
            return None
        at: Declared | None = self._root
        for name in path[1:]:
            assert at is not None
            if name in ("@items", "@values"):
                at = at.element
            elif name == "@keys":
                # Keys are unbounded strings to the estimate: their declared type says nothing of their length.
                return 0 if at.kind == "map" else None
            else:
                at = at.fields.get(name)
            if at is None:
                return None
        return at.most if at is not None else None


def _most(argument: _Argument) -> int:
    return MOST if argument.size is None else argument.size


def _regex(target: _Argument, pattern: _Argument) -> int:
    return _multiply(_factor(_add(_most(target), 1), _CHARACTER), _factor(_most(pattern), _REGEX))


def _is_bind(loop: Any) -> bool:
    """Whether a comprehension stands for `cel.bind`."""
    condition = loop.loop_condition
    return (
        has(loop.iter_range, "list") and not loop.iter_range.list.elements
        and has(condition, "constant") and has(condition.constant, "bool") and not condition.constant.bool
        and loop.accu_var != _ACCUMULATORS[0]
    )  # fmt: skip


def _literal_size(expr: Any) -> int | None:
    match kind(expr):
        case "constant" if has(expr.constant, "string"):
            return len(expr.constant.string)
        case "constant" if has(expr.constant, "bytes"):
            return len(expr.constant.bytes)
        case "constant":
            return 1
        case "list":
            return len(expr.list.elements)
        case "map":
            return len(expr.struct.entries)
    return None


_PRIMITIVES: Mapping[int, str] = {1: "bool", 2: "int", 3: "uint", 4: "double", 5: "string", 6: "bytes"}
_KNOWN: Mapping[int, str] = {1: "any", 2: "timestamp", 3: "duration"}


def _kind(declared: Any) -> str:
    if has(declared, "primitive"):
        return _PRIMITIVES[declared.primitive]
    if has(declared, "known"):
        return _KNOWN[declared.known]
    names = {"list": "list", "map": "map", "message": "struct", "param": "param", "opaque": "opaque"}
    return next((found for name, found in names.items() if has(declared, name)), "dyn")


def _is_scalar(declared: Any) -> bool:
    if declared is None:
        return False
    if has(declared, "opaque") and declared.opaque.name == "optional_type":
        return _is_scalar(declared.opaque.parameters[0])
    return _kind(declared) in _SCALARS
