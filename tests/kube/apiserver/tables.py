"""Objects as the rows `kubectl get` prints."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from tests.kube.apiserver.jsonpath import find, first
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Object

NAME = {
    "name": "Name", "type": "string", "format": "name", "priority": 0,
    "description": "Name must be unique within a namespace.",
}  # fmt: skip


def age(timestamp: Any, now: datetime.datetime) -> str:
    """How long ago, as kubectl writes it."""
    if not timestamp:
        return "<unknown>"
    then = datetime.datetime.fromisoformat(str(timestamp).replace("Z", "+00:00"))
    seconds = int((now - then).total_seconds())
    if seconds < 0:
        return "0s" if seconds > -2 else "<invalid>"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if hours < 192:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    return f"{days}d"


Cell = Callable[[Object], Any]


def _count(path: str) -> Cell:
    return lambda obj: first(obj, path) or 0


def _ready(wanted: str, ready: str) -> Cell:
    return lambda obj: f"{first(obj, ready) or 0}/{first(obj, wanted) or 0}"


def _pod_ready(obj: Object) -> str:
    statuses = find(obj, ".status.containerStatuses[*].ready")
    return f"{sum(bool(s) for s in statuses)}/{len(obj['spec'].get('containers') or ())}"


def _pod_status(obj: Object) -> str:
    if obj["metadata"].get("deletionTimestamp"):
        return "Terminating"
    waiting = find(obj, ".status.containerStatuses[*].state.waiting.reason")
    return str(waiting[0] if waiting else first(obj, ".status.reason") or first(obj, ".status.phase") or "Unknown")


def _restarts(obj: Object) -> str:
    return str(sum(find(obj, ".status.containerStatuses[*].restartCount")))


def _ports(obj: Object) -> str:
    shown = [
        f"{p['port']}{':' + str(p['nodePort']) if p.get('nodePort') else ''}/{p.get('protocol', 'TCP')}"
        for p in obj["spec"].get("ports") or ()
    ]
    return ",".join(shown) or "<none>"


def _budget(field: str) -> Cell:
    def cell(obj: Object) -> Any:
        value = obj["spec"].get(field)
        return "N/A" if value is None else value

    return cell


_COLUMNS: dict[str, list[tuple[str, str, Cell]]] = {
    "Pod": [
        ("Ready", "string", _pod_ready), ("Status", "string", _pod_status), ("Restarts", "string", _restarts),
    ],
    "Deployment": [
        ("Ready", "string", _ready(".spec.replicas", ".status.readyReplicas")),
        ("Up-to-date", "integer", _count(".status.updatedReplicas")),
        ("Available", "integer", _count(".status.availableReplicas")),
    ],
    "ReplicaSet": [
        ("Desired", "integer", _count(".spec.replicas")), ("Current", "integer", _count(".status.replicas")),
        ("Ready", "integer", _count(".status.readyReplicas")),
    ],
    "Service": [
        ("Type", "string", lambda o: o["spec"].get("type")),
        ("Cluster-IP", "string", lambda o: o["spec"].get("clusterIP") or "<none>"),
        ("External-IP", "string", lambda o: "<none>"), ("Port(s)", "string", _ports),
    ],
    "ConfigMap": [("Data", "string", lambda o: len(o.get("data") or {}) + len(o.get("binaryData") or {}))],
    "Secret": [("Type", "string", lambda o: o.get("type")), ("Data", "string", lambda o: len(o.get("data") or {}))],
    "Namespace": [("Status", "string", lambda o: first(o, ".status.phase"))],
    "ServiceAccount": [("Secrets", "string", lambda o: len(o.get("secrets") or ()))],
    "PodDisruptionBudget": [
        ("Min Available", "string", _budget("minAvailable")), ("Max Unavailable", "string", _budget("maxUnavailable")),
        ("Allowed Disruptions", "integer", _count(".status.disruptionsAllowed")),
    ],
    "HorizontalPodAutoscaler": [
        ("Reference", "string", lambda o: "{kind}/{name}".format(**o["spec"]["scaleTargetRef"])),
        ("MinPods", "string", _count(".spec.minReplicas")), ("MaxPods", "string", _count(".spec.maxReplicas")),
        ("Replicas", "string", _count(".status.currentReplicas")),
    ],
    "RoleBinding": [("Role", "string", lambda o: "{kind}/{name}".format(**o["roleRef"]))],
    "ClusterRoleBinding": [("Role", "string", lambda o: "{kind}/{name}".format(**o["roleRef"]))],
    "Event": [
        ("Last Seen", "string", lambda o: o.get("lastTimestamp") or ""), ("Type", "string", lambda o: o.get("type")),
        ("Reason", "string", lambda o: o.get("reason")),
        ("Object", "string", lambda o: "{}/{}".format(
            str(o["involvedObject"].get("kind", "")).lower(), o["involvedObject"].get("name", ""))),
        ("Message", "string", lambda o: o.get("message")),
    ],
    "CustomResourceDefinition": [("Created At", "date", lambda o: o["metadata"]["creationTimestamp"])],
}  # fmt: skip
_AGELESS = {"Event", "CustomResourceDefinition"}


def _columns(resource: Resource) -> list[Object]:
    if resource.custom:
        return [
            {"name": c.name, "type": c.type, "format": "", "priority": c.priority,
             "description": c.description or f"Custom resource definition column (in JSONPath format): {c.path}"}
            for c in resource.columns
        ]  # fmt: skip
    shown = [
        {"name": name, "type": kind, "format": "", "priority": 0, "description": name}
        for name, kind, _ in _COLUMNS.get(resource.kind, ())
    ]
    if resource.kind not in _AGELESS:
        shown.append({"name": "Age", "type": "string", "format": "", "priority": 0, "description": "Age"})
    return shown


def _cells(resource: Resource, obj: Object, now: datetime.datetime) -> list[Any]:
    name = obj["metadata"]["name"]
    if resource.custom:
        return [name, *(_custom_cell(obj, c.path, c.type, now) for c in resource.columns)]
    shown = [cell(obj) for _, _, cell in _COLUMNS.get(resource.kind, ())]
    if resource.kind == "Event" and shown[0]:
        shown[0] = age(shown[0], now)
    if resource.kind not in _AGELESS:
        shown.append(age(obj["metadata"].get("creationTimestamp"), now))
    return [name, *shown]


def _custom_cell(obj: Object, path: str, kind: str, now: datetime.datetime) -> Any:
    try:
        values = find(obj, path)
    except ValueError:
        return None
    if not values:
        return None
    value = values[0]
    if kind == "date":
        return age(value, now)
    if kind == "integer":
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    if kind == "number":
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if kind == "boolean":
        return value if isinstance(value, bool) else None
    return str(value).lower() if isinstance(value, bool) else str(value)


def row(resource: Resource, obj: Object, now: datetime.datetime, include: str) -> Object:
    """One row; `include` is None, Metadata or Object."""
    shown: Object = {"cells": _cells(resource, obj, now)}
    if include == "Object":
        shown["object"] = obj
    elif include != "None":
        shown["object"] = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
    return shown


def table(
    resource: Resource, objects: list[Object], now: datetime.datetime, include: str, meta: Object, *,
    headers: bool = True,
) -> Object:  # fmt: skip
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
        "columnDefinitions": [NAME, *_columns(resource)] if headers else None,
        "rows": [row(resource, obj, now, include) for obj in objects],
    }  # fmt: skip
