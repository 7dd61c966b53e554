"""All fields of a manifest as a flat list, read from the model: for the documentation, for suggestions when a name is
misspelt, and for the list of fields that local mode ignores."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from controller.api.common import CLUSTER_ONLY
from controller.api.model import KVCluster

Path = tuple[str, ...]
"""camelCase names from the top of the manifest; items of a list are under the name `[]`."""


@dataclass(frozen=True, slots=True)
class SpecField:
    """One field. `type` and `allowed` are prose for people; `default` is None where there is none to state."""

    path: Path
    type: str
    allowed: str
    required: bool
    default: Any
    description: str
    cluster_only: bool


_NAMES: Mapping[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _strip(annotation: Any) -> tuple[Any, list[Any]]:
    """The bare type, and all constraints found on the way through Annotated and `| None`."""
    constraints: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            for item in metadata:
                constraints.extend(item.metadata if isinstance(item, FieldInfo) else [item])
                if isinstance(item, FieldInfo) and item.json_schema_extra is not None:
                    constraints.append(item.json_schema_extra)
            continue
        if get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) == 1:
                annotation = members[0]
                continue
        return annotation, constraints


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_name(annotation: Any) -> str:
    bare, _ = _strip(annotation)
    origin, args = get_origin(bare), get_args(bare)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping of {_type_name(args[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is Literal or (isinstance(bare, type) and issubclass(bare, Enum)):
        return "string"
    return "object" if _is_model(bare) else _NAMES[bare]


def choices(annotation: Any) -> list[str]:
    """The values a closed type allows; empty for an open one."""
    bare, constraints = _strip(annotation)
    for constraint in constraints:
        if isinstance(constraint, dict) and "enum" in constraint:
            return list(constraint["enum"])
    if get_origin(bare) is Literal:
        return [str(value) for value in get_args(bare)]
    if isinstance(bare, type) and issubclass(bare, Enum):
        return [str(member.value) for member in bare]
    return []


def _allowed(annotation: Any, constraints: Sequence[Any]) -> str:
    closed = choices(annotation)
    if not closed:
        for item in constraints:
            if isinstance(item, dict) and "enum" in item:
                closed = list(item["enum"])
    if closed:
        return ", ".join(f"`{value}`" for value in closed)
    _, inner = _strip(annotation)
    parts = []
    for item in (*inner, *constraints):
        match item:
            case annotated_types.Ge(ge):
                parts.append(f"≥ {ge:,}")
            case annotated_types.Gt(gt):
                parts.append(f"> {gt:,}")
            case annotated_types.Le(le):
                parts.append(f"≤ {le:,}")
            case annotated_types.MaxLen(length):
                parts.append(
                    f"at most {length:,} {'items' if _type_name(annotation).startswith('list') else 'characters'}"
                )
            case _:
                pattern = getattr(item, "pattern", None)
                if pattern is not None:
                    parts.append(f"`{pattern}`")
    return ", ".join(dict.fromkeys(parts))


def _is_cluster_only(info: FieldInfo) -> bool:
    return any(item is CLUSTER_ONLY for item in info.metadata)


def _walk(model: type[BaseModel], parent: Path, cluster_only: bool = False) -> Iterator[SpecField]:
    # What only a cluster honours comes last, so that a reader meets the fields that always matter first.
    for name, info in sorted(model.model_fields.items(), key=lambda item: _is_cluster_only(item[1])):
        path = (*parent, info.alias or name)
        bare, _ = _strip(info.annotation)
        if info.description is None:
            raise LookupError(f"{'.'.join(path)} has no docstring")
        factory = info.default_factory
        yield SpecField(
            path=path,
            type=_type_name(info.annotation),
            allowed=_allowed(info.annotation, [*info.metadata, info.json_schema_extra]),
            required=info.is_required(),
            default=None if info.is_required() or factory is not None or _is_model(bare) else info.default,
            description=info.description,
            cluster_only=cluster_only or _is_cluster_only(info),
        )
        below = path
        if get_origin(bare) is list:
            bare, below = _strip(get_args(bare)[0])[0], (*path, "[]")
        if _is_model(bare):
            yield from _walk(bare, below, cluster_only or _is_cluster_only(info))


FIELDS: tuple[SpecField, ...] = tuple(_walk(KVCluster, ()))
"""Every field of the manifest, parents before children, in the order of the model."""


def names_under(parent: Path) -> list[str]:
    """Names of the fields directly under `parent`; none where the schema leaves the content open."""
    return [field.path[-1] for field in FIELDS if field.path[:-1] == parent]


def paths_ending_in(name: str) -> list[str]:
    """Dotted paths of all fields of this name that are not inside a list."""
    return [".".join(field.path) for field in FIELDS if field.path[-1] == name and "[]" not in field.path]


def cluster_only_in(manifest: KVCluster) -> list[str]:
    """Paths of the fields that the manifest sets, differing from the default, and that only a cluster honours."""
    found: list[str] = []

    def visit(value: BaseModel, parent: Path) -> None:
        for name, info in type(value).model_fields.items():
            here, content = (*parent, info.alias or name), getattr(value, name)
            if _is_cluster_only(info):
                if content != info.get_default(call_default_factory=True):
                    found.append(".".join(here))
            elif isinstance(content, BaseModel):
                visit(content, here)
            elif isinstance(content, list):
                for index, item in enumerate(content):
                    if isinstance(item, BaseModel):
                        visit(item, (*here[:-1], f"{here[-1]}[{index}]"))

    visit(manifest, ())
    return found
