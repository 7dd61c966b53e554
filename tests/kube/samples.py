"""Objects for tests of API servers and their clients."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

GROUP = "conformance.example.dev"
WIDGETS = f"/apis/{GROUP}/v1alpha1"


def widget_definition() -> Object:
    """A CRD with everything of a structural schema that is modelled."""
    replicas = {"type": "integer", "minimum": 0, "default": 2, "description": "How many workers."}
    part = {
        "type": "object", "required": ["name"],
        "properties": {"name": {"type": "string"}, "size": {"type": "integer", "default": 1}},
    }  # fmt: skip
    spec = {
        "type": "object",
        "description": "What is wanted.",
        "required": ["model"],
        "properties": {
            "model": {"type": "string", "minLength": 1, "maxLength": 20, "description": "The model to serve."},
            "mode": {"type": "string", "enum": ["fast", "slow"], "default": "fast"},
            "min": {"type": "integer", "default": 1},
            "max": {"type": "integer", "maximum": 100},
            "blockSize": {
                "type": "integer", "default": 16,
                "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "blockSize is immutable"}],
            },
            "workers": {"type": "object", "default": {}, "properties": {"replicas": replicas}},
            "port": {"x-kubernetes-int-or-string": True},
            "code": {"type": "string", "pattern": "^[a-z]+$"},
            "since": {"type": "string", "format": "date-time"},
            "parts": {
                "type": "array", "maxItems": 3, "items": part,
                "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
            },
            "args": {"type": "array", "maxItems": 8, "items": {"type": "string", "maxLength": 64}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "extra": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
        "x-kubernetes-validations": [
            {"rule": "!has(self.max) || self.min <= self.max", "fieldPath": ".min", "message": "min exceeds max"},
            {"rule": "self.mode != 'slow' || !has(self.code)", "message": "slow widgets have no code"},
        ],
    }  # fmt: skip
    status = {
        "type": "object",
        "properties": {
            "ready": {"type": "integer"},
            "selector": {"type": "string"},
            "conditions": {
                "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object", "required": ["type", "status"],
                    "properties": {name: {"type": "string"} for name in ("type", "status", "reason", "message")},
                },
            },
        },
    }  # fmt: skip
    version = {
        "name": "v1alpha1", "served": True, "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas", "statusReplicasPath": ".status.ready",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": "Model", "type": "string", "jsonPath": ".spec.model"},
            {"name": "Workers", "type": "integer", "jsonPath": ".spec.workers.replicas"},
            {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
            {"name": "Mode", "type": "string", "jsonPath": ".spec.mode", "priority": 1},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
        "schema": {
            "openAPIV3Schema": {
                "type": "object", "required": ["spec"], "description": "Widget is what these tests are about.",
                "properties": {"spec": spec, "status": status},
            }
        },
    }  # fmt: skip
    names = {
        "plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList", "shortNames": ["wd"],
        "categories": ["all"],
    }  # fmt: skip
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"widgets.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def widget(name: str = "a", **spec: Any) -> Object:
    return {
        "apiVersion": f"{GROUP}/v1alpha1", "kind": "Widget", "metadata": {"name": name},
        "spec": {"model": "gpt2", **spec},
    }  # fmt: skip


def deployment(name: str = "web", **spec: Any) -> Object:
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "web:1", "ports": [{"containerPort": 80}]}]},
            },
            **spec,
        },
    }  # fmt: skip


def pod(name: str = "p", labels: dict[str, str] | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels or {}},
        "spec": {"containers": [{"name": "main", "image": "web:1"}], **spec},
    }  # fmt: skip


def config_map(name: str = "c", data: dict[str, str] | None = None, **meta: Any) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **meta}, "data": data or {}}
