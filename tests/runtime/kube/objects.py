"""Objects, lists and events as an API server sends them."""

from __future__ import annotations

from typing import Any


def item(name: str, value: object = None, version: int = 1) -> dict[str, Any]:
    """An object of namespace `ns` that says one thing."""
    return {"metadata": {"name": name, "namespace": "ns", "resourceVersion": str(version)}, "value": value}


def listing(*items: dict[str, Any], version: int = 1) -> dict[str, Any]:
    """The answer to a list."""
    return {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": str(version)}, "items": list(items)}


def event(kind: str, about: dict[str, Any], version: int | None = None) -> dict[str, Any]:
    """One event of a watch."""
    if version is not None:
        about = {**about, "metadata": {**about["metadata"], "resourceVersion": str(version)}}
    return {"type": kind, "object": about}


def bookmark(version: int) -> dict[str, Any]:
    """An event that tells how far the watch has got."""
    return {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}


def status(code: int, reason: str = "", message: str = "", **details: Any) -> dict[str, Any]:
    """A Status object, as errors carry it."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
        **({"details": details} if details else {}),
    }
