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
