"""The EndpointSlices of a Service: a pure function of the Service and the pods it selects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.kube.kubelet.rollout import is_ready

MANAGED_BY = "endpointslice-controller.k8s.io"
SERVICE_NAME = "kubernetes.io/service-name"
MANAGER = "endpointslice.kubernetes.io/managed-by"
HEADLESS = "service.kubernetes.io/headless"

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """What one slice says: pods whose named ports resolve to the same numbers share one."""

    ports: list[dict[str, Any]]
    endpoints: list[dict[str, Any]]


def selects(selector: Mapping[str, str], pod: Object) -> bool:
    """Whether every label of the selector is the pod's."""
    labels = pod["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in selector.items())


def is_headless(service: Object) -> bool:
    """Whether the Service has no address of its own."""
    return bool(service["spec"].get("clusterIP") == "None")


def contents(service: Object, pods: Iterable[Object]) -> list[Content]:
    """The slices of a Service that has a selector; one without endpoints when no pod has an address yet."""
    groups: dict[str, Content] = {}
    for pod in sorted(pods, key=lambda each: str(each["metadata"]["name"])):
        if not selects(service["spec"]["selector"], pod) or not _belongs(pod):
            continue
        ports = _ports(service, pod)
        group = groups.setdefault(json.dumps(ports, sort_keys=True), Content(ports, []))
        group.endpoints.append(_endpoint(service, pod))
    return list(groups.values()) or [Content([], [])]


def labels(service: Object) -> dict[str, str]:
    """The labels of a slice: its Service's, and who made it for which Service."""
    own = {SERVICE_NAME: str(service["metadata"]["name"]), MANAGER: MANAGED_BY}
    if is_headless(service):
        own[HEADLESS] = ""
    return {**(service["metadata"].get("labels") or {}), **own}


def owner(service: Object) -> dict[str, Any]:
    """The reference by which a slice goes with its Service."""
    metadata = service["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _belongs(pod: Object) -> bool:
    status = pod.get("status", {})
    return bool(status.get("podIP")) and status.get("phase") not in ("Succeeded", "Failed")


def _endpoint(service: Object, pod: Object) -> dict[str, Any]:
    metadata = pod["metadata"]
    serving, terminating = is_ready(pod), "deletionTimestamp" in metadata
    # Never ready once it terminates, unless the Service asks for pods in whatever state.
    ready = bool(service["spec"].get("publishNotReadyAddresses")) or (serving and not terminating)
    endpoint: dict[str, Any] = {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "targetRef": {
            "kind": "Pod",
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
    }
    if "nodeName" in pod["spec"]:
        endpoint["nodeName"] = pod["spec"]["nodeName"]
    return endpoint


def _ports(service: Object, pod: Object) -> list[dict[str, Any]]:
    ports = []
    for port in service["spec"].get("ports") or ():
        number = target_port(port.get("targetPort", port["port"]), pod, port.get("protocol", "TCP"))
        if number is None:
            continue
        resolved = {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
        if "appProtocol" in port:
            resolved["appProtocol"] = port["appProtocol"]
        ports.append(resolved)
    return ports


def target_port(target: int | str, pod: Object, protocol: str = "TCP") -> int | None:
    """The number of a port given by number or by the name a container of the pod gives it."""
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or ():
            if port.get("name") == target and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None
