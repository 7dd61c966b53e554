"""The EndpointSlice controller: slices of every Service that has a selector.

Played: conditions of endpoints (ready, serving, terminating), named ports that differ by pod, headless Services, as
in `endpointslice/reconciler.go`. Checked by `test_pod_states.py` and `test_kubelet.py`. Not played: more than 100
endpoints a slice, IPv6, topology hints.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.kubelet.api import ENDPOINT_SLICES, PODS, SERVICES, Api, Key, Object, WorkQueue, key_of
from tests.kube.kubelet.rollout import is_ready

MANAGED_BY = "endpointslice-controller.k8s.io"
SERVICE_NAME = "kubernetes.io/service-name"
MANAGER = "endpointslice.kubernetes.io/managed-by"
HEADLESS = "service.kubernetes.io/headless"


class EndpointSlices:
    """Reconciles the slices of Services, by the Services' names. Slices that others manage are left alone."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._labels: dict[str, Object] = {}
        self.queue = WorkQueue(self._reconcile)
        api.on_change(SERVICES, lambda item, _: self.queue.add(key_of(item)))
        api.on_change(ENDPOINT_SLICES, self._on_slice)
        api.on_change(PODS, self._on_pod)

    def _on_slice(self, item: Object, exists: bool) -> None:
        if service := _service_of(item):
            self.queue.add(service)

    def _on_pod(self, item: Object, exists: bool) -> None:
        uid = item["metadata"]["uid"]
        for service in self._api.all(SERVICES):
            selector = service["spec"].get("selector")
            # A pod whose labels changed leaves the Services that selected it before.
            before = self._labels.get(uid)
            touched = any(selector and selects(selector, each) for each in (item, before or item))
            if touched and service["metadata"]["namespace"] == item["metadata"]["namespace"]:
                self.queue.add(key_of(service))
        if exists:
            self._labels[uid] = {"metadata": {"labels": item["metadata"].get("labels")}}
        else:
            self._labels.pop(uid, None)

    def _reconcile(self, key: Key) -> None:
        service = self._api.get(SERVICES, key)
        present = [each for each in self._api.all(ENDPOINT_SLICES) if _service_of(each) == key]
        if service is None:
            return  # they go with their Service
        if not service["spec"].get("selector"):
            return
        pods = [pod for pod in self._api.all(PODS) if pod["metadata"]["namespace"] == key[0]]
        spare = [each for each in present if _owned(each, service)]
        for content in contents(service, pods):
            match = _closest(content, spare)
            if match is None:
                self._create(service, content)
                continue
            spare.remove(match)
            wanted = {"ports": content.ports, "endpoints": content.endpoints}
            changed = any((match.get(field) or []) != value for field, value in wanted.items())
            if changed or match["metadata"].get("labels") != labels(service):
                patch = {**wanted, "metadata": {"labels": labels(service)}}
                self._api.patch(ENDPOINT_SLICES, key_of(match), patch)
        for each in spare:
            self._api.delete(ENDPOINT_SLICES, each)

    def _create(self, service: Object, content: Content) -> None:
        name = service["metadata"]["name"]
        self._api.create(
            ENDPOINT_SLICES,
            {
                "metadata": {
                    "namespace": service["metadata"]["namespace"],
                    "name": f"{name}-{secrets.token_hex(3)[:5]}",
                    "generateName": f"{name}-",
                    "labels": labels(service),
                    "ownerReferences": [owner(service)],
                },
                "addressType": "IPv4",
                "ports": content.ports,
                "endpoints": content.endpoints,
            },
        )


def _service_of(item: Object) -> Key | None:
    """The Service of a slice of ours."""
    marks = item["metadata"].get("labels") or {}
    if marks.get(MANAGER) != MANAGED_BY or SERVICE_NAME not in marks:
        return None
    return item["metadata"]["namespace"], marks[SERVICE_NAME]


def _owned(item: Object, service: Object) -> bool:
    references = item["metadata"].get("ownerReferences") or ()
    return any(each["uid"] == service["metadata"]["uid"] for each in references)


def _closest(content: Content, candidates: Sequence[Object]) -> Object | None:
    """The slice with the same ports, else any."""
    same = (each for each in candidates if (each.get("ports") or []) == content.ports)
    return next(same, next(iter(candidates), None))


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
