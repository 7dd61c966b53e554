"""How Envoy's messages are written as JSON."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
"""A message of Envoy's API (protobuf) as JSON."""

_TYPE = "type.googleapis.com/envoy."


def typed(kind: str, **fields: Any) -> Message:
    """A message that says of what type it is, `kind` without its common beginning."""
    return {"@type": _TYPE + kind, **fields}


def extension(name: str, kind: str, **fields: Any) -> Message:
    """An extension of Envoy with its configuration, which is what most lists hold."""
    return {"name": name, "typed_config": typed("extensions." + kind, **fields)}


def seconds(value: float) -> str:
    """A duration. Envoy takes at most nine digits behind the point."""
    return f"{value:.9f}".rstrip("0").rstrip(".") + "s"


def address(host: str, port: int) -> Message:
    """A TCP address. `::` listens on IPv4, too."""
    found: Message = {"address": host, "port_value": port}
    return {"socket_address": found | ({"ipv4_compat": True} if host == "::" else {})}


def pipe(path: str, mode: int | None = None) -> Message:
    """A Unix socket; `mode`: its permissions, where it is a listener's."""
    return {"pipe": {"path": path} | ({} if mode is None else {"mode": mode})}


def percent(share: float) -> Message:
    return {"value": round(100.0 * share, 6)}
