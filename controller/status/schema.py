"""The structural schema of the status, for the CRD."""

from __future__ import annotations

from typing import Any

from controller.api.routing import Strategy
from controller.status.compute import AGES
from controller.status.conditions import MESSAGE_LENGTH
from controller.status.reasons import ConditionType

STATUS_REPLICAS_PATH = ".status.workers.replicas"
LABEL_SELECTOR_PATH = ".status.selector"
"""For the CRD's scale subresource."""

_CONDITION_TYPE = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
)


def status_schema() -> dict[str, Any]:
    """OpenAPI v3 schema of `status`, as a CRD takes it."""
    return _object(
        "What the controller found. It alone writes here.",
        {
            "observedGeneration": _count("metadata.generation that this status is about.", form="int64"),
            "conditions": {
                "type": "array",
                "description": f"{', '.join(ConditionType)}: see docs/status.md.",
                "items": _condition(),
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
            "workers": _figures("worker"),
            "routers": _figures("router"),
            "strategy": _string("How the routers choose a worker.", enum=[strategy.value for strategy in Strategy]),
            "endpoint": _string(
                "Base URL of the OpenAI API: the load balancer's or a node's, else the Service's inside the cluster.",
                maxLength=512,
            ),
            "hitRate": _string(
                "Share of prompt tokens that came from the workers' caches since the routers started. Absent before "
                "the first request.",
                maxLength=16,
            ),
            "cache": _object(
                "What the routers know of the workers' caches.",
                {
                    "hitRatePermille": _count(
                        "hitRate in thousandths. Changes of less than 5 are not shown.", maximum=1000
                    ),
                    "viewAgeSeconds": _count(
                        "Age of the oldest view that a router has of a ready worker's cache, rounded up: "
                        f"{', '.join(map(str, AGES[:-1]))} or {AGES[-1]} (or more). Absent without a view.",
                        maximum=AGES[-1],
                    ),
                },
            ),
            "models": _string("The models that the routers' workers serve, by their first names.", maxLength=4096),
            "adapters": _object(
                "The LoRA adapters of spec.model.adapters. Absent without any.",
                {
                    "summary": _string("loaded/listed, for a column of kubectl get.", maxLength=32),
                    "loaded": _count("Adapters that every ready worker has loaded."),
                    "wanted": _count("Adapters that are listed."),
                    "each": {
                        "type": "array",
                        "description": "The adapters, in their order in the spec.",
                        "items": _object(
                            "One adapter.",
                            {
                                "name": _string("Name under which requests ask for it.", maxLength=253),
                                "workers": _count("Ready workers that have it loaded."),
                            },
                            ["name", "workers"],
                        ),
                        "x-kubernetes-list-type": "map",
                        "x-kubernetes-list-map-keys": ["name"],
                    },
                },
            ),
            "selector": _string("Label selector of the worker pods, for the scale subresource.", maxLength=512),
        },
    )


def _object(description: str, properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "description": description, "properties": properties}
    return schema if required is None else {**schema, "required": required}


def _string(description: str, **limits: Any) -> dict[str, Any]:
    return {"type": "string", **limits, "description": description}


def _count(description: str, *, form: str = "int32", **limits: int) -> dict[str, Any]:
    return {"type": "integer", "format": form, "minimum": 0, "description": description, **limits}


def _figures(noun: str) -> dict[str, Any]:
    return _object(
        f"How many {noun}s there are.",
        {
            "summary": _string("ready/wanted, for a column of kubectl get.", maxLength=32),
            "wanted": _count(f"{noun.capitalize()}s that there should be."),
            "replicas": _count("Pods of the Deployment, old and new."),
            "ready": _count("Pods that take requests."),
            "updated": _count("Pods of the current spec."),
            "available": _count("Pods that have been ready for the Deployment's minReadySeconds."),
        },
    )


def _condition() -> dict[str, Any]:
    """metav1.Condition."""
    return _object(
        "One aspect of the state.",
        {
            "type": _string("What it is about.", maxLength=316, pattern=_CONDITION_TYPE),
            "status": _string("Whether it holds.", enum=["True", "False", "Unknown"]),
            "observedGeneration": _count("metadata.generation that it is about.", form="int64"),
            "lastTransitionTime": _string("When status last changed.", format="date-time"),
            "reason": _string(
                "Why, in one word for programs: see docs/status.md.",
                minLength=1,
                maxLength=1024,
                pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
            ),
            "message": _string("Why, in words for people, and what to do.", maxLength=MESSAGE_LENGTH),
        },
        ["type", "status", "lastTransitionTime", "reason", "message"],
    )
