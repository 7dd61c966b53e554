"""The controller's gauges: what they say of KVClusters that exist, and that they are silent about those that do not.

Not covered: counters (test_operator.py, test_connections.py, reconcile/test_reconciler.py; all of them against the
requests that an API server saw: tests/kube/operator/test_metrics.py), and docs/metrics.md (tests/test_documents.py).
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from controller.kube.kinds import KVCLUSTER
from controller.metrics import ClusterCollector
from controller.reconcile.inventory import Inventory


def kvcluster(name: str, version: str, *conditions: tuple[str, str, str]) -> dict[str, Any]:
    status = {"conditions": [{"type": kind, "status": status, "reason": why} for kind, status, why in conditions]}
    metadata = {"name": name, "namespace": "shop", "uid": name, "resourceVersion": version}
    return {"metadata": metadata, **({"status": status} if conditions else {})}


def series(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Values of a gauge by the values of its labels."""
    [family] = [each for each in registry.collect() if each.name == f"kvcluster_controller_{name}"]
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_conditions_are_gauges_while_the_kvcluster_exists():
    registry, inventory = CollectorRegistry(), Inventory()
    registry.register(ClusterCollector(inventory, lambda: 3, lambda: {"pods": 4.5}))
    inventory.put(KVCLUSTER, kvcluster("new", "1"))
    inventory.put(KVCLUSTER, kvcluster("rag", "2", ("Ready", "False", "NoneReady"), ("Degraded", "False", "AllWell")))
    assert series(registry, "clusters") == {("True",): 0, ("False",): 1, ("Unknown",): 1}
    assert series(registry, "condition") == {
        ("shop", "rag", "Ready", "False", "NoneReady"): 1,
        ("shop", "rag", "Degraded", "False", "AllWell"): 1,
    }
    ready = kvcluster("rag", "3", ("Ready", "True", "Serving"))
    inventory.put(KVCLUSTER, ready)
    assert series(registry, "condition") == {("shop", "rag", "Ready", "True", "Serving"): 1}, "the former is gone"
    inventory.drop(KVCLUSTER, ready)
    assert series(registry, "condition") == {}
    assert series(registry, "clusters") == {("True",): 0, ("False",): 0, ("Unknown",): 1}
    assert series(registry, "queue_length") == {(): 3}
    assert series(registry, "watch_age_seconds") == {("pods",): 4.5}
