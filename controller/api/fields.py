"""All fields of a manifest as a flat list, read from the model: for the documentation, for suggestions when a name is
misspelt, and for the list of fields that local mode ignores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

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


Schema = dict[str, Any]


def resolved(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The JSON schema behind a reference, or the one beside `null` where a value is optional."""
    while True:
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        elif "anyOf" in node:
            (node,) = [member for member in node["anyOf"] if member.get("type") != "null"]
        else:
            return node


def _walk(
    model: Schema, definitions: Mapping[str, Schema], parent: Path, cluster_only: bool = False
) -> Iterator[SpecField]:
    # What only a cluster honours comes last, so that a reader meets the fields that always matter first.
    for name, node in sorted(model["properties"].items(), key=lambda item: CLUSTER_ONLY.KEYWORD in item[1]):
        path, value = (*parent, name), resolved(node, definitions)
        description = node.get("description") or value.get("description")
        if description is None:
            raise LookupError(f"{'.'.join(path)} has no docstring")
        field = SpecField(
            path=path,
            type=_type_name(value, definitions),
            allowed=_allowed(value),
            required=name in model.get("required", ()),
            default=None if value["type"] == "object" else node.get("default"),
            description=description,
            cluster_only=cluster_only or CLUSTER_ONLY.KEYWORD in node,
        )
        yield field
        below = path
        if value["type"] == "array":
            value, below = resolved(value["items"], definitions), (*path, "[]")
        if "properties" in value:
            yield from _walk(value, definitions, below, field.cluster_only)


def _type_name(value: Schema, definitions: Mapping[str, Schema]) -> str:
    if value["type"] == "array":
        return f"list of {_type_name(resolved(value['items'], definitions), definitions)}"
    if value["type"] != "object" or "properties" in value:
        return str(value["type"])
    values = value["additionalProperties"]
    return "mapping" if values is True else f"mapping of {_type_name(values, definitions)}"


def _allowed(value: Schema) -> str:
    closed = value.get("enum") or ([value["const"]] if "const" in value else [])
    if closed:
        return ", ".join(f"`{choice}`" for choice in closed)
    bounds = {
        "minimum": "≥ {:,}",
        "exclusiveMinimum": "> {:,}",
        "maximum": "≤ {:,}",
        "maxItems": "at most {:,} items",
        "maxLength": "at most {:,} characters",
        "pattern": "`{}`",
    }
    return ", ".join(text.format(value[keyword]) for keyword, text in bounds.items() if keyword in value)


_SCHEMA = KVCluster.model_json_schema()
FIELDS: tuple[SpecField, ...] = tuple(_walk(_SCHEMA, _SCHEMA["$defs"], ()))
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
            if CLUSTER_ONLY in info.metadata:
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
