"""The controller's metrics. docs/metrics.md describes each, and a test holds it and this module together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.kube.kinds import KVCLUSTER
from controller.objects.names import Object
from controller.reconcile.inventory import Inventory

PREFIX = "kvcluster_controller_"
RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ReconcileResult(StrEnum):
    """How a reconciliation ended."""

    DONE = "done"
    RETRY = "again"
    """It could not finish, and is tried again."""


class Metrics:
    """Counters and histograms. `ClusterCollector` has the gauges, which it reads from the inventory."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reconciles = Counter(
            PREFIX + "reconciles",
            "Reconciliations, by result (done, again).",
            ["result"],
            registry=registry,
        )
        self.seconds = Histogram(
            PREFIX + "reconcile_seconds", "Duration of a reconciliation.", buckets=RECONCILE_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.writes = Counter(
            PREFIX + "writes", "Writes to the API server, by verb and kind.", ["verb", "kind"], registry=registry
        )
        self.healed = Counter(
            PREFIX + "healed",
            "KVClusters for which a full list brought news that no watch had brought.",
            registry=registry,
        )


class ClusterCollector(Collector):
    """Gauges about KVClusters, read at each scrape."""

    def __init__(self, inventory: Inventory, waiting: Callable[[], int]) -> None:
        self._inventory = inventory
        self._waiting = waiting

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(PREFIX + "clusters", "KVClusters, by whether they are Ready.", labels=["ready"]),
            GaugeMetricFamily(PREFIX + "queue_length", "KVClusters that wait to be reconciled.", labels=[]),
        )

    def collect(self) -> Iterable[Metric]:
        clusters, queue = self._families()
        counts = dict.fromkeys(("True", "False", "Unknown"), 0)
        for key in self._inventory.keys(KVCLUSTER):
            counts[_ready(self._inventory.get(KVCLUSTER, key) or {})] += 1
        for state, count in counts.items():
            clusters.add_metric([state], count)
        queue.add_metric([], self._waiting())
        return (clusters, queue)


def _ready(body: Object) -> str:
    conditions: Sequence[Object] = (body.get("status") or {}).get("conditions") or ()
    status = next((item["status"] for item in conditions if item["type"] == "Ready"), "Unknown")
    return status if status in ("True", "False") else "Unknown"
