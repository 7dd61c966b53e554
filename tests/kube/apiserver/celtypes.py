"""What a rule may know of the value it stands on: the CEL type of a schema, and how large its values can be.

Modelled: a transcription of Kubernetes 1.36's `SchemaDeclType` (k8s.io/apiserver/pkg/cel/common/schemas.go) and of the
escaping of field names (pkg/cel/escaping.go), checked by `test_conformance_definitions.py`. The compiler is told of the
types as protobuf messages, for those are what the reference implementation knows beside the basic types.

Not modelled, and refused by `Unmodelled`: a rule on or above a list or map that lies directly inside a list or map,
which has no such form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf import descriptor_pb2, descriptor_pool, struct_pb2, timestamp_pb2

from tests.kube.apiserver.schema import Node

MAX_REQUEST = 3 * 1024 * 1024
"""Bytes of the largest request, which bounds what a schema does not."""


class Unmodelled(Exception):
    """A rule asks for what a real API server does and this one does not."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A value's type. `most` is the most characters, items or entries it can have, `least` its fewest bytes in JSON."""

    kind: str
    """object, list, map, string, timestamp, bool, double, int or dyn."""
    most: int = 0
    least: int = 1
    fields: Mapping[str, Declared] = field(default_factory=dict)
    """Of an object, by their names in CEL."""
    element: Declared | None = None
    """A list's items or a map's values."""

    @property
    def cardinality(self) -> int:
        """How often such a value can stand in an object whose schema does not bound it."""
        return MAX_REQUEST // (self.least + 1)


_STRING = Declared("string", MAX_REQUEST - 2, 2)
_RESERVED = frozenset(
    {
        "true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import",
        "let", "loop", "package", "namespace", "return", "var", "void", "while",
    }
)  # fmt: skip
_ESCAPES = {"__": "__underscores__", ".": "__dot__", "-": "__dash__", "/": "__slash__"}


def escaped(name: str) -> str | None:
    """The name of a field in CEL; None for one that CEL cannot name."""
    if re.fullmatch(r"[A-Za-z_./-][\w./-]*", name, re.ASCII) is None:
        return None
    if name in _RESERVED:
        return f"__{name}__"
    return re.sub(r"__|[-./]", lambda found: _ESCAPES[found.group()], name)


def declared(node: Node, *, resource: bool = False) -> Declared | None:
    """The type of a schema's values; None where rules do not see them. `resource`: it is the root of a resource."""
    if node.int_or_string:
        return Declared("dyn", _longest(node))
    match node.type:
        case "array":
            items = declared(node.items) if node.items is not None else None
            if items is None:
                return None
            most = node.facets.get("maxItems", (MAX_REQUEST - 2) // (items.least + 1))
            return Declared("list", most, 2, {}, items)
        case "object" if node.additional is not None:
            values = declared(node.additional)
            if values is None:
                return None
            return Declared("map", (MAX_REQUEST - 2) // (values.least + 6), 2, {}, values)
        case "object":
            return _object(node, resource)
        case "string":
            if node.facets.get("format") == "date-time":
                return Declared("timestamp", 32, 21)
            return Declared("string", _longest(node), 2)
        case "boolean":
            return Declared("bool", least=4)
        case "number":
            return Declared("double")
        case "integer":
            return Declared("int")
    return None


def _object(node: Node, resource: bool) -> Declared:
    fields: dict[str, Declared] = {}
    least = 2
    for name, below in node.properties.items():
        known = declared(below)
        if known is None:
            continue
        if (called := escaped(name)) is not None:
            fields[called] = known
        if name in node.required and not below.has_default:
            least += len(name) + known.least + 4
    if resource and not _names_are_typed(node):
        names = Declared("object", 0, 2, {"name": _STRING, "generateName": _STRING})
        fields |= {"apiVersion": _STRING, "kind": _STRING, "metadata": names}
    return Declared("object", 0, least, fields)


def _names_are_typed(node: Node) -> bool:
    """Whether the root of a resource declares all that rules may read anyway: then its own bounds count."""
    metadata = node.properties.get("metadata", Node())
    declarations = [node.properties.get("apiVersion"), node.properties.get("kind")]
    declarations += [metadata.properties.get("name"), metadata.properties.get("generateName")]
    return all(found is not None and found.type == "string" for found in declarations)


def _longest(node: Node) -> int:
    """Bytes of the longest string: a character may take four."""
    if "maxLength" in node.facets:
        return int(node.facets["maxLength"]) * 4
    if node.facets.get("enum") and not node.int_or_string:
        return max(len(str(value).encode()) for value in node.facets["enum"])
    return MAX_REQUEST - 2


# --- the same as protobuf messages -------------------------------------------------------------------------

_F = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": _F.TYPE_STRING, "bool": _F.TYPE_BOOL, "double": _F.TYPE_DOUBLE, "int": _F.TYPE_INT64}
_MESSAGES = {"dyn": ".google.protobuf.Value", "timestamp": ".google.protobuf.Timestamp"}
PACKAGE = "selfType"


def _entry_name(field: str) -> str:
    """What protobuf calls the message of a map's entries."""
    return "".join(part[:1].upper() + part[1:] for part in field.split("_")) + "Entry"


class Messages:
    """Descriptors of a type and all below it; `name(type)` is how a CEL environment calls it."""

    def __init__(self, root: Declared) -> None:
        self._file = descriptor_pb2.FileDescriptorProto(name="self.proto", package=PACKAGE, syntax="proto3")
        self._made = 0
        self.root = self._named(root)
        self.pool = descriptor_pool.DescriptorPool()
        for module in (struct_pb2, timestamp_pb2):
            self.pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
            self._file.dependency.append(module.DESCRIPTOR.name)
        self.pool.AddSerializedFile(self._file.SerializeToString())

    def _named(self, kind: Declared) -> str:
        """The type as CEL writes it."""
        if kind.kind == "object":
            return f"{PACKAGE}.{self._message(kind)}"
        if kind.element is not None:
            below = self._named(kind.element)
            return f"list<{below}>" if kind.kind == "list" else f"map<string,{below}>"
        return _MESSAGES.get(kind.kind, kind.kind).lstrip(".").replace("google.protobuf.Value", "dyn")

    def _message(self, kind: Declared) -> str:
        self._made += 1
        message = self._file.message_type.add(name=f"object{self._made}")
        for number, (name, value) in enumerate(sorted(kind.fields.items()), 1):
            made = message.field.add(name=name, json_name=f"field{number}", number=number, label=_F.LABEL_OPTIONAL)
            if value.kind == "list":
                made.label = _F.LABEL_REPEATED
                self._type(made, value.element)
            elif value.kind == "map":
                entry = message.nested_type.add(name=_entry_name(name))
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=_F.LABEL_OPTIONAL, type=_F.TYPE_STRING)
                self._type(entry.field.add(name="value", number=2, label=_F.LABEL_OPTIONAL), value.element)
                made.label, made.type = _F.LABEL_REPEATED, _F.TYPE_MESSAGE
                made.type_name = f".{PACKAGE}.{message.name}.{entry.name}"
            else:
                self._type(made, value)
        return message.name

    def _type(self, made: descriptor_pb2.FieldDescriptorProto, kind: Declared | None) -> None:
        assert kind is not None, "lists and maps have elements"
        if kind.element is not None:
            raise Unmodelled(f"a {kind.kind} directly inside a list or map, on or below a rule")
        if kind.kind in _SCALARS:
            made.type = _SCALARS[kind.kind]
            return
        made.type = _F.TYPE_MESSAGE
        made.type_name = _MESSAGES.get(kind.kind) or f".{PACKAGE}.{self._message(kind)}"
