"""A KVCluster with two routers and four workers, as it is read."""

from __future__ import annotations

from typing import Any

from controller.status.compute import compute
from tests.controller.status.support import NOW, ago, observed, pod, report

Raw = dict[str, Any]

WORKERS = [f"rag-worker-{index}" for index in range(4)]
ROUTERS = ["rag-router-a", "rag-router-b"]
LABELS = {"app.kubernetes.io/name": "kvcluster", "app.kubernetes.io/instance": "rag"}


def cluster(**changes: Any) -> Raw:
    """The object with the status that the controller gives it; `changes` are made to what is observed."""
    seen = observed(**changes)
    return {
        "apiVersion": "kvcluster.dev/v1alpha1",
        "kind": "KVCluster",
        "metadata": {"name": "rag", "namespace": "ns", "generation": 7, "creationTimestamp": ago(hours=3)},
        "spec": {"workers": {"replicas": 4}},
        "status": compute(seen, None, NOW),
    }


def a_pod(name: str, **changes: Any) -> Raw:
    found = pod(name, **{"podIP": "127.0.0.9", **changes})
    found["metadata"]["labels"] |= LABELS
    found["spec"] = {"nodeName": "node-1"}
    return found


PODS = [a_pod(name, podIP=f"10.0.0.{index}") for index, name in enumerate([*WORKERS, *ROUTERS])]


def row(name: str, **changes: Any) -> Raw:
    """A worker in a router's `/workers`."""
    return {
        "worker_id": name,
        "url": "http://10.0.0.99:8100",
        "view_age": 0.4,
        "blocks": 900,
        "capacity": 924,
        "in_flight": 2,
        "ready": True,
        "why_not_ready": "",
        "matching": True,
        "why_not_matching": "",
        **changes,
    }


STATUS: Raw = {
    "strategy": "cache_aware",
    "draining": False,
    "workers": {"known": 4, "ready": 4, "matching": 4},
    "view_age_seconds": 0.4,
    "prompt_tokens": 1000,
    "cached_tokens": 823,
    "decisions": {"prefix_match": 90, "no_match": 10},
    "recent": [
        {
            "age_seconds": 1.25,
            "worker_id": "rag-worker-2",
            "reason": "prefix_match",
            "matched_blocks": 12,
            "prompt_blocks": 14,
            "predicted_ttft_seconds": 0.0125,
        }
    ],
    "discovery": {"source": "kubernetes", "healthy": True, "age_seconds": 0.8, "error": ""},
    "reuse_score": {"rag-worker-0": 132.5},
}
"""A router's `/status`."""

EVENT: Raw = {
    "metadata": {"name": "e"},
    "involvedObject": {"kind": "KVCluster", "name": "rag"},
    "type": "Normal",
    "reason": "Serving",
    "message": "Requests are answered.",
    "lastTimestamp": ago(minutes=5),
    "count": 1,
}

__all__ = ["EVENT", "NOW", "PODS", "ROUTERS", "STATUS", "WORKERS", "a_pod", "ago", "cluster", "report", "row"]
