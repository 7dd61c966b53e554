"""The controller's metrics. docs/metrics.md describes each, and a test holds it and this module together.

The values of labels are bounded: enums, the kinds of `controller.kube.kinds`, and the KVClusters that exist. Those are
read from the inventory at each scrape, so that a KVCluster that has been deleted leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.kube.kinds import KVCLUSTER
from controller.objects.names import Object
from controller.reconcile.inventory import Inventory

PREFIX = "kvcluster_controller_"
RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ReconcileOutcome(StrEnum):
    """How a reconcile ended."""

    DONE = "done"
    """All was written that there was to write. Whether the spec can be carried out, the conditions say."""
    RETRY = "retry"
    """The API server refused something, or could not be reached. It is tried again."""
    ERROR = "error"
    """A defect of the controller. It is tried again."""


class Metrics:
    """Counters and histograms. `ClusterCollector` has the gauges."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.reconciles = counter("reconciles", "Reconciles, by outcome.", "outcome")
        self.seconds = Histogram(
            PREFIX + "reconcile_seconds", "Duration of a reconcile, by outcome.", ["outcome"],
            buckets=RECONCILE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.writes = counter("writes", "Writes to the API server.", "verb", "kind", "outcome")
        self.repairs = counter("drift_repairs", "Objects brought back to what had been applied.", "kind")
        self.failures = counter(
            "api_failures", "Requests to the API server without an answer of success.", "operation", "cause"
        )
        self.healed = counter("healed", "KVClusters for which a full list brought news that no watch had brought.")
        for outcome in ReconcileOutcome:  # so that the first of each is an increase
            self.reconciles.labels(outcome)
            self.seconds.labels(outcome)

    def reconciled(self, outcome: ReconcileOutcome, seconds: float) -> None:
        """A reconcile ended."""
        self.reconciles.labels(outcome).inc()
        self.seconds.labels(outcome).observe(seconds)

    def wrote(self, verb: str, kind: str, outcome: str) -> None:
        """A write to the API server ended."""
        self.writes.labels(verb, kind, outcome).inc()

    def repaired(self, kind: str) -> None:
        """An object that had been changed or deleted by someone else is what was applied again."""
        self.repairs.labels(kind).inc()

    def request_failed(self, operation: str, cause: str) -> None:
        """A request, kopf's or ours, had no answer of success."""
        self.failures.labels(operation, cause).inc()


class ClusterCollector(Collector):
    """Gauges, read at each scrape: `waiting` is the length of the work queue, `watch_ages` are seconds by resource."""

    def __init__(
        self,
        inventory: Inventory,
        waiting: Callable[[], int],
        watch_ages: Callable[[], Mapping[str, float]],
    ) -> None:
        self._inventory = inventory
        self._waiting = waiting
        self._watch_ages = watch_ages

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, ...]:
        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, text, labels=labels)

        return (
            gauge("clusters", "KVClusters, by whether they are Ready.", "ready"),
            gauge(
                "condition",
                "1 for each condition of a KVCluster as it is.",
                *("namespace", "kvcluster", "condition", "status", "reason"),
            ),
            gauge("queue_length", "KVClusters that wait to be reconciled."),
            gauge("watch_age_seconds", "Time since a watch last showed that it is alive.", "resource"),
        )

    def collect(self) -> Iterable[Metric]:
        clusters, condition, queue, ages = families = self._families()
        counts = dict.fromkeys(("True", "False", "Unknown"), 0)
        for namespace, name in self._inventory.keys(KVCLUSTER):
            conditions = _conditions(self._inventory.get(KVCLUSTER, (namespace, name)) or {})
            counts[conditions.get("Ready", ("Unknown", ""))[0]] += 1
            for kind, (status, reason) in conditions.items():
                condition.add_metric([namespace, name, kind, status, reason], 1)
        for state, count in counts.items():
            clusters.add_metric([state], count)
        queue.add_metric([], self._waiting())
        for resource, age in self._watch_ages().items():
            ages.add_metric([resource], age)
        return families


def _conditions(body: Object) -> dict[str, tuple[str, str]]:
    """Type -> status and reason. The status of an object was written by us, or by someone who may write anything."""
    conditions: Sequence[Object] = (body.get("status") or {}).get("conditions") or ()
    return {
        item["type"]: (item["status"] if item["status"] in ("True", "False") else "Unknown", item.get("reason", ""))
        for item in conditions
    }
