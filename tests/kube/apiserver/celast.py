"""The checked syntax tree of a CEL expression, read from the compiler's serialized `cel.expr.CheckedExpr`.

Only what a cost estimate needs is read: expressions, the type of each, and the overloads that each call may resolve to.
Field numbers are those of cel-spec's `checked.proto` and `syntax.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_F = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"i": _F.TYPE_INT64, "u": _F.TYPE_UINT64, "d": _F.TYPE_DOUBLE, "s": _F.TYPE_STRING, "y": _F.TYPE_BYTES,
            "b": _F.TYPE_BOOL, "e": _F.TYPE_INT32}  # fmt: skip
_MESSAGES = {
    "Any": "1type_url:s 2value:Checked",
    "Checked": "2*references:Referred 3*types:Typed 4expr:Expr",
    "Referred": "1id:i 2value:Reference",
    "Reference": "3*overloads:s",
    "Typed": "1id:i 2value:Type",
    "Type": "1dyn:Empty 2null:e 3primitive:e 4wrapper:e 5known:e 6list:ListType 7map:MapType 9message:s 10param:s "
    "11type:Type 14opaque:Opaque",
    "Empty": "",
    "ListType": "1element:Type",
    "MapType": "1key:Type 2value:Type",
    "Opaque": "1name:s 2*parameters:Type",
    "Expr": "2id:i 3constant:Constant 4ident:Ident 5select:Select 6call:Call 7list:List 8struct:Struct "
    "9comprehension:Comprehension",
    "Constant": "1null:e 2bool:b 3int:i 4uint:u 5double:d 6string:s 7bytes:y 8duration:Empty 9timestamp:Empty",
    "Ident": "1name:s",
    "Select": "1operand:Expr 2field:s 3test_only:b",
    "Call": "1target:Expr 2function:s 3*args:Expr",
    "List": "1*elements:Expr",
    "Struct": "1name:s 2*entries:Entry",
    "Entry": "2field_key:s 3map_key:Expr 4value:Expr",
    "Comprehension": "1iter_var:s 2iter_range:Expr 3accu_var:s 4accu_init:Expr 5loop_condition:Expr 6loop_step:Expr "
    "7result:Expr 8iter_var2:s",
}


def _reader() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="checked.proto", package="read", syntax="proto2")
    for name, members in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for member in members.split():
            declared, kind = member.split(":")
            number = declared[: len(declared) - len(declared.lstrip("0123456789"))]
            repeated = declared[len(number)] == "*"
            made = message.field.add(
                name=declared[len(number) + repeated :], number=int(number),
                label=_F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL,
            )  # fmt: skip
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
            else:
                made.type, made.type_name = _F.TYPE_MESSAGE, f".read.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("read.Any"))


_ANY = _reader()


@dataclass(frozen=True)
class Tree:
    """An expression with what the checker found out about its parts, by their ids."""

    expr: Any
    types: Mapping[int, Any]
    overloads: Mapping[int, tuple[str, ...]]


def read(serialized: bytes) -> Tree:
    """The tree of a compiled expression."""
    checked = _ANY.FromString(serialized).value
    return Tree(
        checked.expr,
        {typed.id: typed.value for typed in checked.types},
        {referred.id: tuple(referred.value.overloads) for referred in checked.references},
    )


def has(message: Any, name: str) -> bool:
    """Whether a field of a message is set."""
    return bool(message.HasField(name))


def kind(expr: Any) -> str:
    """constant, ident, select, call, list, struct, map or comprehension."""
    found = next((name for name in ("constant", "ident", "select", "call", "list", "struct", "comprehension")
                  if has(expr, name)), "")  # fmt: skip
    return "map" if found == "struct" and not expr.struct.name else found
