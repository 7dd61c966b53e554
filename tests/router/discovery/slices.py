"""EndpointSlices as the control plane writes them."""

from __future__ import annotations

from typing import Any

PORTS = ({"name": "http", "port": 8100, "protocol": "TCP"},)


def endpoint(
    address: str, pod: str = "", uid: str = "", *, addresses: list[str] | None = None, **conditions: bool | None
) -> dict[str, Any]:
    """One endpoint; conditions that are not given are absent, as the API allows."""
    made: dict[str, Any] = {"addresses": [address] if addresses is None else addresses}
    if conditions:
        made["conditions"] = conditions
    if pod:
        made["targetRef"] = {"kind": "Pod", "name": pod, "namespace": "ns", "uid": uid or f"uid-{pod}"}
    return made


def endpoint_slice(
    name: str,
    *endpoints: dict[str, Any],
    ports: Any = PORTS,
    family: str = "IPv4",
    version: int = 1,
) -> dict[str, Any]:
    """One slice of Service `workers` in namespace `ns`."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "ns",
            "resourceVersion": str(version),
            "labels": {"kubernetes.io/service-name": "workers"},
        },
        "addressType": family,
        "endpoints": list(endpoints) or None,
        "ports": list(ports) if ports is not None else None,
    }


def slice_list(*slices: dict[str, Any], version: int = 1) -> dict[str, Any]:
    """The answer to a list."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSliceList",
        "metadata": {"resourceVersion": str(version)},
        "items": list(slices),
    }


def event(kind: str, about: dict[str, Any], version: int | None = None) -> dict[str, Any]:
    """One event of a watch."""
    if version is not None:
        about = {**about, "metadata": {**about["metadata"], "resourceVersion": str(version)}}
    return {"type": kind, "object": about}


def bookmark(version: int) -> dict[str, Any]:
    return {"type": "BOOKMARK", "object": {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(version)}}}


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
