"""Reads objects as the API server gives them. What is missing or malformed counts as absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Raw = Mapping[str, Any]
"""An object as the API server gives it, or a part of one."""
_EMPTY: Raw = {}


def at(content: Raw | None, *path: str) -> Any:
    """The value at this path; None where there is none."""
    value: Any = content
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def mapping(content: Raw | None, *path: str) -> Raw:
    """The object at this path, or an empty one."""
    value = at(content, *path)
    return value if isinstance(value, Mapping) else _EMPTY


def objects(content: Raw | None, *path: str) -> list[Raw]:
    """The objects of the list at this path."""
    value = at(content, *path)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [item for item in value if isinstance(item, Mapping)]


def number(content: Raw | None, *path: str) -> int:
    """The whole number at this path, or 0."""
    value = at(content, *path)
    return value if type(value) is int else 0


def text(content: Raw | None, *path: str) -> str:
    """The string at this path, or an empty one."""
    value = at(content, *path)
    return value if type(value) is str else ""


def condition(content: Raw | None, kind: str) -> Raw:
    """The condition of this type in the object's status, or an empty one."""
    return next((item for item in objects(content, "status", "conditions") if item.get("type") == kind), _EMPTY)


def name(content: Raw) -> str:
    """metadata.name."""
    return text(content, "metadata", "name")


def when(value: object) -> datetime | None:
    """A moment as the API server writes it."""
    if type(value) is not str:
        return None
    try:
        return moment(value)
    except ValueError:
        return None


def moment(given: datetime | str) -> datetime:
    """An aware datetime, from RFC 3339 too. Raises `ValueError` for one without a zone."""
    parsed = datetime.fromisoformat(given) if isinstance(given, str) else given
    if parsed.tzinfo is None:
        raise ValueError(f"{given} has no time zone")
    return parsed


def timestamp(aware: datetime) -> str:
    """A moment as the API server writes it, to the second."""
    return aware.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_terminating(content: Raw) -> bool:
    """Whether the object is being deleted."""
    return at(content, "metadata", "deletionTimestamp") is not None
