"""Custom resources of the Gateway API (HTTPRoute) and of its Inference Extension (InferencePool v1, InferenceObjective
v1alpha2): the fields that are used here, with the validation that the projects' own CRDs have of them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

Object = dict[str, Any]

POOLS = "/apis/inference.networking.k8s.io/v1"
ROUTES = "/apis/gateway.networking.k8s.io/v1"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

_PORT = {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535}
_GROUP = {
    "type": "string", "maxLength": 253,
    "pattern": r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}  # fmt: skip
_KIND = {"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"}
_NAME = {"type": "string", "minLength": 1, "maxLength": 253}
_NAMESPACE = {"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}


def _object(properties: Object, *required: str, **more: Any) -> Object:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {}), **more}


def _conditions() -> Object:
    condition = _object(
        {
            "type": {"type": "string", "maxLength": 316},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
            "message": {"type": "string", "maxLength": 32768},
        },
        *("lastTransitionTime", "message", "reason", "status", "type"),
    )
    return {
        "type": "array", "maxItems": 8, "items": condition,
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
    }  # fmt: skip


def _parent(**more: Object) -> Object:
    group, kind = {**_GROUP, "default": "gateway.networking.k8s.io"}, {**_KIND, "default": "Gateway"}
    return _object({"group": group, "kind": kind, "name": _NAME, "namespace": _NAMESPACE, **more}, "name")


def _definition(group: str, version: str, kind: str, spec: Object, status: Object) -> Object:
    plural = f"{kind.lower()}s"
    schema = _object({"spec": spec, "status": status}, "spec")
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def pool_definition() -> Object:
    """InferencePool v1."""
    picker = _object(
        {
            "group": {**_GROUP, "default": ""},
            "kind": {**_KIND, "default": "Service"},
            "name": _NAME,
            "port": _object({"number": _PORT}, "number"),
            "failureMode": {"type": "string", "enum": ["FailOpen", "FailClose"], "default": "FailClose"},
        },
        "name",
        **{
            "x-kubernetes-validations": [
                {"rule": "self.kind != 'Service' || has(self.port)", "message": "port is required for a Service"}
            ]
        },
    )
    value = {"type": "string", "maxLength": 63, "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
    labels = {"type": "object", "additionalProperties": value}
    ports = {
        "type": "array", "minItems": 1, "maxItems": 8, "x-kubernetes-list-type": "atomic",
        "items": _object({"number": _PORT}, "number"),
    }  # fmt: skip
    spec = _object(
        {
            "appProtocol": {"type": "string", "enum": ["http", "kubernetes.io/h2c"], "default": "http"},
            "endpointPickerRef": picker,
            "selector": _object({"matchLabels": labels}, "matchLabels"),
            "targetPorts": ports,
        },
        *("selector", "targetPorts"),
    )
    controller = {"type": "string", "minLength": 1, "maxLength": 253}
    parent = _object(
        {"conditions": _conditions(), "controllerName": controller, "parentRef": _parent()},
        "parentRef",
    )
    status = _object({"parents": {"type": "array", "maxItems": 32, "items": parent}})
    return _definition("inference.networking.k8s.io", "v1", "InferencePool", spec, status)


def objective_definition(group: str = "llm-d.ai") -> Object:
    """InferenceObjective v1alpha2. Two projects define it, each with a group of its own, and they differ: the pool that
    a reference without a group means, the bounds of a priority, and that llm-d's (0.10)
    selects pools in other ways, too."""
    newer = group == "llm-d.ai"
    pools = "llm-d.ai" if newer else "inference.networking.k8s.io"
    kind = {**_KIND, "default": "InferencePool"}
    reference = _object({"group": {**_GROUP, "default": pools}, "kind": kind, "name": _NAME}, "name")
    priority = {"type": "integer", **({"format": "int32"} if newer else {})}
    pending = {
        "type": "Ready", "status": "Unknown", "reason": "Pending", "message": "Waiting for controller",
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    }  # fmt: skip
    conditions = {**_conditions(), "default": [pending]}
    if newer:
        expression = _object({"key": _NAME, "operator": _NAME, "values": {"type": "array", "items": _NAME}}, "key")
        labels = {"type": "object", "additionalProperties": {"type": "string"}}
        selector = _object({"matchLabels": labels, "matchExpressions": {"type": "array", "items": expression}})
        several = {"type": "array", "items": reference}
        spec = _object({"priority": priority, "poolRef": reference, "poolRefs": several, "poolSelector": selector})
    else:
        spec = _object({"priority": priority, "poolRef": reference}, "poolRef")
    return _definition(group, "v1alpha2", "InferenceObjective", spec, _object({"conditions": conditions}))


def route_definition() -> Object:
    """HTTPRoute v1."""
    backend = _object(
        {
            "group": {**_GROUP, "default": ""},
            "kind": {**_KIND, "default": "Service"},
            "name": _NAME,
            "namespace": _NAMESPACE,
            "port": _PORT,
            "weight": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 1_000_000, "default": 1},
        },
        "name",
        **{
            "x-kubernetes-validations": [
                {
                    "rule": "size(self.group) > 0 || self.kind != 'Service' || has(self.port)",
                    "message": "Must have port for Service reference",
                }
            ]
        },
    )
    path = _object(
        {
            "type": {"type": "string", "enum": ["Exact", "PathPrefix", "RegularExpression"], "default": "PathPrefix"},
            "value": {"type": "string", "maxLength": 1024, "default": "/"},
        }
    )
    rule = _object(
        {
            "matches": {"type": "array", "maxItems": 64, "items": _object({"path": path})},
            "backendRefs": {"type": "array", "maxItems": 16, "items": backend},
        }
    )
    parent = _parent(sectionName={"type": "string", "minLength": 1, "maxLength": 253}, port=_PORT)
    spec = _object(
        {
            "parentRefs": {"type": "array", "maxItems": 32, "items": parent},
            "hostnames": {"type": "array", "maxItems": 16, "items": _NAME},
            "rules": {"type": "array", "minItems": 1, "maxItems": 16, "items": rule},
        }
    )
    controller = {"type": "string", "minLength": 1, "maxLength": 253}
    of_parent = _object(
        {"parentRef": _parent(), "controllerName": controller, "conditions": _conditions()},
        *("parentRef", "controllerName"),
    )
    status = _object({"parents": {"type": "array", "maxItems": 32, "items": of_parent}})
    return _definition("gateway.networking.k8s.io", "v1", "HTTPRoute", spec, status)


async def install(client: httpx.AsyncClient, *definitions: Object) -> None:
    """Create these CRDs and wait until they are served."""
    for definition in definitions:
        answer = await client.post(DEFINITIONS, json=definition)
        assert answer.status_code in (201, 409), answer.text
    for definition in definitions:
        spec = definition["spec"]
        path = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        async with asyncio.timeout(30):
            while (await client.get(path)).status_code != 200:  # noqa: ASYNC110  nothing tells when
                await asyncio.sleep(0.02)


async def uninstall(client: httpx.AsyncClient, definition: Object) -> None:
    """Delete this CRD, and with it its objects, and wait until it is gone."""
    path = f"{DEFINITIONS}/{definition['metadata']['name']}"
    await client.delete(path)
    async with asyncio.timeout(30):
        while (await client.get(path)).status_code != 404:  # noqa: ASYNC110  nothing tells when
            await asyncio.sleep(0.02)


def inference_pool(name: str, labels: dict[str, str], *ports: int) -> Object:
    """A pool without a picker."""
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]},
    }
