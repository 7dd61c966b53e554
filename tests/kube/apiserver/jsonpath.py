"""The part of JSONPath that printer columns and scale paths use."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_STEP = re.compile(
    r"\.(?P<name>[A-Za-z0-9_\-/]+|\*)"
    r"|\[(?P<index>-?\d+)\]"
    r"|\[(?P<star>\*)\]"
    r"|\['(?P<quoted>[^']*)'\]|\[\"(?P<quoted2>[^\"]*)\"\]"
    r"|\[\?\(@(?P<left>\.[^=!<>]+?)\s*(?P<op>==|!=)\s*(?P<right>'[^']*'|\"[^\"]*\"|[^)]+)\)\]"
)
# A name in which dots are escaped.
_ESCAPED = re.compile(r"\.((?:[^.\[\\]|\\.)+)")


@lru_cache(maxsize=256)
def _steps(path: str) -> tuple[tuple[str, Any], ...]:
    steps: list[tuple[str, Any]] = []
    position = 0
    path = path.strip()
    path = path if path.startswith((".", "[")) else f".{path}"
    while position < len(path):
        escaped = _ESCAPED.match(path, position)
        match = escaped if escaped and "\\" in escaped.group(1) else _STEP.match(path, position)
        if match is None or match.end() == position:
            raise ValueError(f"not a JSONPath: {path!r}")
        if match is escaped:
            steps.append(("name", re.sub(r"\\(.)", r"\1", match.group(1))))
        else:
            steps.append(_step(match))
        position = match.end()
    return tuple(steps)


def _step(match: re.Match[str]) -> tuple[str, Any]:
    found = match.groupdict()
    if found["name"] == "*" or found["star"]:
        return "all", None
    if found["index"]:
        return "index", int(found["index"])
    if found["left"]:
        return "filter", (found["left"], found["op"], found["right"].strip("'\""))
    return "name", found["name"] or found["quoted"] or found["quoted2"]


def find(obj: Any, path: str) -> list[Any]:
    """Every value at a path. Raises `ValueError` for a path that is none."""
    values = [obj]
    for kind, argument in _steps(path):
        after: list[Any] = []
        for value in values:
            after.extend(_follow(value, kind, argument))
        values = after
    return values


def _follow(value: Any, kind: str, argument: Any) -> list[Any]:
    if kind == "name":
        return [value[argument]] if isinstance(value, dict) and value.get(argument) is not None else []
    if kind == "all":
        return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []
    if not isinstance(value, list):
        return []
    if kind == "index":
        return [value[argument]] if -len(value) <= argument < len(value) else []
    left, op, right = argument
    return [item for item in value if (_text(find(item, left)) == right) is (op == "==")]


def _text(values: list[Any]) -> str:
    value = values[0] if values else None
    return str(value).lower() if isinstance(value, bool) else str(value)


def first(obj: Any, path: str) -> Any:
    """The first value at a path, or None."""
    values = find(obj, path)
    return values[0] if values else None
