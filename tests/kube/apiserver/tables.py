"""Objects as the rows that `kubectl get` prints, and the paths at which a definition says where its values are.

Modelled: the columns of CustomResourceDefinitions, by paths of names and one comparison
(`.status.conditions[?(@.type=="Ready")].status`). Checked against the real server by `test_conformance.py` and
`test_kubectl.py`. Not modelled: the columns of built-in kinds, of which name and age are shown; ages in other words
than seconds. A definition with other paths is refused (`customresources.py`), and so are rows with other objects than
metadata.
"""

from __future__ import annotations

import datetime
import re
from functools import lru_cache
from typing import Any

from tests.kube.apiserver.resources import Column, Resource
from tests.kube.apiserver.store import Object

NAME = {
    "name": "Name", "type": "string", "format": "name", "priority": 0,
    "description": "Name must be unique within a namespace.",
}  # fmt: skip
AGE = Column("Age", ".metadata.creationTimestamp", "date")
_STEP = re.compile(r"""\.(?P<name>[A-Za-z0-9_-]+)|\[\?\(@\.(?P<key>\w+)\s*==\s*["'](?P<value>[^"']*)["']\)\]""")


@lru_cache(maxsize=256)
def steps(path: str) -> tuple[tuple[str, ...], ...]:
    """(name,) or (key, value of the item) of each step of a path. Raises `ValueError` for what is not modelled."""
    found: list[tuple[str, ...]] = []
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None:
            raise ValueError(f"path {path!r}")
        found.append((match["name"],) if match["name"] else (match["key"], match["value"]))
        position = match.end()
    return tuple(found)


def first(obj: Any, path: str) -> Any:
    """The first value at a path, or None."""
    for step in steps(path):
        if len(step) == 1:
            obj = obj.get(step[0]) if isinstance(obj, dict) else None
        else:
            key, value = step
            obj = next((item for item in obj or () if item.get(key) == value), None)
    return obj


def _cell(obj: Object, column: Column, now: datetime.datetime) -> Any:
    value = first(obj, column.path)
    if value is None or column.type == "integer":
        return value
    if column.type == "date":
        return f"{max(int((now - datetime.datetime.fromisoformat(value)).total_seconds()), 0)}s"
    return str(value)


def table(resource: Resource, objects: list[Object], now: datetime.datetime, meta: Object) -> Object:
    """The answer to a list or get that asks for a table."""
    columns = resource.columns or (AGE,)
    about = [
        {"name": c.name, "type": c.type, "format": "", "priority": c.priority, "description": c.description or c.name}
        for c in columns
    ]
    rows = []
    for obj in objects:
        shown = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
        rows.append({"cells": [obj["metadata"]["name"], *(_cell(obj, c, now) for c in columns)], "object": shown})
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "columnDefinitions": [NAME, *about],
        "rows": rows,
    }  # fmt: skip
