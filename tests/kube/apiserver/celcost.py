"""What a CEL expression can cost at most, by Kubernetes' own estimate, which decides whether a CRD is accepted.

A transcription of cel-go's `checker/cost.go`, of which only the upper bound is kept, for that alone is compared with a
budget; what calls cost is in `celfunctions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver import celfunctions
from tests.kube.apiserver.celast import Tree, has, kind
from tests.kube.apiserver.celfunctions import MOST, Argument, Found, add, multiply
from tests.kube.apiserver.celtypes import Declared

_LIST, _MAP, _STRUCT = 10, 30, 40
_SCALARS = frozenset({"bool", "double", "duration", "int", "timestamp", "uint"})
_ACCUMULATORS = ("__result__", "@result")

Path = tuple[str, ...]


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
                return add(*(self.cost(entry.value) for entry in expr.struct.entries), _STRUCT)
            case "comprehension":
                return self._bind(expr) if _is_bind(expr.comprehension) else self._comprehension(expr)
        return 0

    def _select(self, expr: Any) -> int:
        operand = expr.select.operand
        cost = self.cost(operand)
        if expr.select.test_only:
            return cost  # Kubernetes does not charge for `has`
        self._paths[expr.id] = (*self._path(operand), expr.select.field)
        return add(cost, 1) if self._kind(operand) in ("map", "struct", "param") else cost

    def _list(self, expr: Any) -> int:
        cost, item = 0, 0
        for element in expr.list.elements:
            cost = add(cost, self.cost(element))
            item = max(item, self._size_or_most(element))
        self._entries[expr.id] = _Entry("list", 1, item)
        return add(cost, _LIST)

    def _map(self, expr: Any) -> int:
        cost, key, value = 0, 0, 0
        for entry in expr.struct.entries:
            cost = add(cost, self.cost(entry.map_key), self.cost(entry.value))
            key, value = max(key, self._size_or_most(entry.map_key)), max(value, self._size_or_most(entry.value))
        self._entries[expr.id] = _Entry("map", key, value)
        return add(cost, _MAP)

    def _comprehension(self, expr: Any) -> int:
        loop = expr.comprehension
        cost = add(self.cost(loop.iter_range), self.cost(loop.accu_init))
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
        once = add(self.cost(loop.loop_condition), self.cost(loop.loop_step))
        for name in variables:
            self._locals[name].pop()
        cost = add(cost, self.cost(loop.result))
        self._locals[loop.accu_var].pop()
        times = self._size_or_most(loop.iter_range)
        match kind(loop.accu_init):
            case "constant":
                self._set(expr, self._size(loop.accu_init))
            case "list" | "map":
                self._set(expr, times)
                if (step := self._entry(loop.loop_step)) is not None:
                    self._entries[expr.id] = step
        return add(cost, multiply(times, once))

    def _bind(self, expr: Any) -> int:
        bind = expr.comprehension
        cost = add(self.cost(bind.iter_range), self.cost(bind.accu_init))
        self._push(bind.accu_var, self._of(bind.accu_init))
        cost = add(cost, self.cost(bind.result))
        self._locals[bind.accu_var].pop()
        self._copy(expr, bind.result)
        return cost

    # --- calls ---------------------------------------------------------------------------------------------

    def _call(self, expr: Any) -> int:
        call = expr.call
        if call.function == "dyn":
            cost = add(1, self.cost(call.args[0]))
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
        return add(cost, most)

    def _function(
        self, expr: Any, overload: str, target: Argument | None, args: Sequence[Argument], costs: Sequence[int]
    ) -> tuple[int, int | None]:
        """The cost of a call, its arguments' included, and the size of its result."""
        if overload in ("logical_and", "logical_or"):
            return add(*costs), None
        if overload == "conditional":
            self._unite(expr, args[1], args[2])
            return add(costs[0], max(costs[1], costs[2])), max(args[1].size, args[2].size)
        if overload in ("add_string", "add_bytes", "add_list"):
            self._unite(expr, args[0], args[1])
        found: Found = celfunctions.cost(expr.call.function, overload, target, args)
        cost, size = found if found is not None else (1, None)
        return add(cost, *costs), size

    def _unite(self, expr: Any, one: Argument, other: Argument) -> None:
        entries = self._entry(one.expr), self._entry(other.expr)
        if entries[0] is not None and entries[1] is not None:
            self._entries[expr.id] = entries[0].union(entries[1])

    # --- what is known of a value -------------------------------------------------------------------------

    def _argument(self, expr: Any) -> Argument:
        path = self._path(expr)
        if path and path[0] in _ACCUMULATORS:
            path = ()
        declared = self._tree.types.get(expr.id)
        element = _kind(declared.list.element) if declared is not None and has(declared, "list") else ""
        item = self._declared_size((*path, "@items")) if path else None
        return Argument(expr, self._size_or_most(expr), element, MOST if item is None else item)

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
