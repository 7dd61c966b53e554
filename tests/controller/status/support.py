"""Objects as an API server gives them, and what the controller makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from controller.api.model import KVClusterSpec, Router, Workers
from controller.status.compute import compute
from controller.status.observed import Observed, RouterReports
from controller.status.report import RouterReport

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
Raw = dict[str, Any]


def ago(**duration: float) -> str:
    return (NOW - timedelta(**duration)).strftime("%Y-%m-%dT%H:%M:%SZ")


def deployment(component: str = "worker", wanted: int = 4, **figures: Any) -> Raw:
    """One that has all its pods; `figures` change its status, `conditions` among them."""
    status = {
        "observedGeneration": 1,
        "replicas": wanted,
        "updatedReplicas": wanted,
        "readyReplicas": wanted,
        "availableReplicas": wanted,
        **figures,
    }
    return {
        "metadata": {"name": f"rag-{component}", "generation": 1},
        "spec": {"replicas": wanted},
        "status": {name: value for name, value in status.items() if value is not None},
    }


def pod(name: str, *, ready: bool = True, since: str | None = None, **status: Any) -> Raw:
    """A pod of the component that its name says; `status` is added to its status."""
    component = "router" if "router" in name else "worker"
    conditions = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": str(ready), "lastTransitionTime": since or ago(hours=1)},
    ]
    return {
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/component": component},
            "creationTimestamp": ago(hours=2),
        },
        "status": {"phase": "Running", "conditions": conditions, **status},
    }


def container(**fields: Any) -> Raw:
    return {"name": "worker", "image": "registry.example/kvcluster:9", "restartCount": 0, "state": {}, **fields}


def waiting(reason: str, message: str = "", **fields: Any) -> list[Raw]:
    """Status of the one container of a pod, which waits."""
    return [container(state={"waiting": {"reason": reason, "message": message}}, **fields)]


def report(**changes: Any) -> RouterReport:
    """A router that has all four workers."""
    return dataclasses.replace(
        RouterReport("cache_aware", 4, 4, 4, view_age_seconds=0.4, prompt_tokens=1000, cached_tokens=823),
        **changes,
    )


WORKERS = tuple(pod(f"rag-worker-{index}") for index in range(4))
ROUTERS = (pod("rag-router-a"), pod("rag-router-b"))
SERVICE = {
    "metadata": {"name": "rag-router"},
    "spec": {"type": "ClusterIP", "ports": [{"name": "http", "port": 8000}]},
}


def answers(given: Mapping[str, RouterReport | str]) -> RouterReports:
    """By router pod: its report, or why it gave none."""
    reports = {name: answer for name, answer in given.items() if isinstance(answer, RouterReport)}
    errors = {name: answer for name, answer in given.items() if isinstance(answer, str)}
    return RouterReports(reports, errors)


def observed(reports: Mapping[str, RouterReport | str] | None = None, **changes: Any) -> Observed:
    """Four workers and two routers, all healthy."""
    base = Observed(
        name="rag",
        namespace="ns",
        generation=7,
        spec=KVClusterSpec(workers=Workers(replicas=4), router=Router(replicas=2)),
        deployments={"worker": deployment(), "router": deployment("router", 2)},
        pods=(*WORKERS, *ROUTERS),
        routers=answers({"rag-router-a": report(), "rag-router-b": report()} if reports is None else reports),
        service=SERVICE,
        workers_wanted=4,
    )
    return dataclasses.replace(base, **changes)


def conditions(seen: Observed, previous: Raw | None = None, now: datetime = NOW) -> dict[str, Raw]:
    """By type."""
    return {item["type"]: item for item in compute(seen, previous, now)["conditions"]}


def reasons(seen: Observed, previous: Raw | None = None, now: datetime = NOW) -> dict[str, str]:
    """By type: `True/AllReady`."""
    return {kind: f"{item['status']}/{item['reason']}" for kind, item in conditions(seen, previous, now).items()}


def with_unready(*pods: Raw, ready: int = 3, **figures: Any) -> Observed:
    """Four workers wanted, `ready` of them healthy, the rest these pods."""
    return observed(
        pods=(*WORKERS[:ready], *pods, *ROUTERS),
        deployments={
            "worker": deployment(readyReplicas=ready, availableReplicas=ready, **figures),
            "router": deployment("router", 2),
        },
        reports={"rag-router-a": report(workers_ready=ready, workers_matching=ready)},
    )
