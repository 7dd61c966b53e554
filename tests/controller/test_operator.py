"""The operator: what it lists at its start, when it reconciles, and that it reports when it no longer works.

Not covered: kopf's watches and handlers, which tests/kube/operator runs against an API server.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from prometheus_client import CollectorRegistry

from controller.kube.connections import ApiServerConnections, ApiServerEvent
from controller.kube.kinds import DEPLOYMENT, KVCLUSTER, Kind
from controller.metrics import Metrics
from controller.operator import WATCHED, Operator
from controller.reconcile.inventory import Inventory, Key
from controller.reconcile.queue import RetryLater
from runtime.kube.errors import KubeApiError
from runtime.kube.listwatch import Watch

pytestmark = pytest.mark.looptime


class Lists:
    """An API server that lists one KVCluster, once it is up."""

    def __init__(self, failures: int = 0) -> None:
        self.asked: list[Kind] = []
        self.deleted = False
        """Whether the KVCluster is gone."""
        self._failures = failures

    async def list(self, kind: Kind, namespace: str | None, selector: str) -> tuple[list[dict[str, object]], str]:
        self.asked.append(kind)
        if self._failures:
            self._failures -= 1
            raise KubeApiError(503, "ServiceUnavailable", "not yet")
        metadata = {"name": "rag", "namespace": "ns", "uid": "u", "resourceVersion": "1"}
        return ([{"metadata": metadata}] if kind == KVCLUSTER and not self.deleted else []), "5"

    async def watch(self, kind: Kind, namespace: str | None, watch: Watch, slack: float) -> EndingStream:
        return EndingStream(watch.seconds)


class EndingStream:
    """A watch in which nothing happens until it ends."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    async def next(self) -> object | None:
        await asyncio.sleep(self._seconds)
        return None

    def close(self) -> None:
        return None


class Reconciler:
    """Which KVClusters the operator had reconciled."""

    def __init__(self, pause: float | None = 10.0) -> None:
        self.keys: list[Key] = []
        self._pause = pause

    async def reconcile(self, key: Key) -> float | None:
        self.keys.append(key)
        return self._pause


def operator(lists: Lists, reconciler: Reconciler, registry: CollectorRegistry | None = None) -> Operator:
    metrics = Metrics(registry or CollectorRegistry())
    return Operator(
        lists,  # type: ignore[arg-type]
        ApiServerConnections(lambda: 0.0),
        Inventory(),
        reconciler,  # type: ignore[arg-type]
        metrics,
        namespaces=(),
        workers=2,
        rng=random.Random(1),
    )


async def test_it_lists_everything_before_it_reconciles_and_reconciles_again_after_the_pause():
    lists, reconciler = Lists(), Reconciler()
    running = operator(lists, reconciler)
    await running.start()
    assert lists.asked == list(WATCHED)
    await asyncio.sleep(25)
    assert reconciler.keys == [("ns", "rag")] * 3
    running.check()
    await running.stop()


async def test_it_waits_for_an_api_server_that_is_not_up_yet():
    lists = Lists(failures=20)
    running = operator(lists, Reconciler())
    await running.start()
    assert len(lists.asked) == len(WATCHED) + 20, "only what failed is asked for again"
    await running.stop()


async def test_its_health_check_fails_once_a_task_has_ended():
    running = operator(Lists(), Reconciler())
    running.check()
    await running.start()
    await running.stop()
    with pytest.raises(RuntimeError, match="queue has ended"):
        running.check()


class Failing(Reconciler):
    """It takes 3 s, and ends in each way in turn."""

    async def reconcile(self, key: Key) -> float | None:
        await asyncio.sleep(3)
        failures = [RetryLater("the server says no"), ZeroDivisionError("a defect")]
        self.keys.append(key)
        if len(self.keys) <= len(failures):
            raise failures[len(self.keys) - 1]
        return None


async def test_reconciles_are_counted_and_timed_by_their_outcome():
    registry = CollectorRegistry()
    running = operator(Lists(), Failing(), registry)
    await running.start()
    await asyncio.sleep(60)
    await running.stop()
    for outcome in ("done", "retry", "error"):
        labels = {"outcome": outcome}
        assert registry.get_sample_value("kvcluster_controller_reconciles_total", labels) == 1
        assert registry.get_sample_value("kvcluster_controller_reconcile_seconds_sum", labels) == pytest.approx(3)


async def test_a_cluster_is_reconciled_when_an_object_loses_its_label():
    reconciler = Reconciler(pause=None)
    running = operator(Lists(), reconciler)
    await running.start()
    await asyncio.sleep(1)
    reconciler.keys.clear()
    labels = {"app.kubernetes.io/instance": "rag"}
    metadata = {"name": "rag-worker", "namespace": "ns", "uid": "d", "resourceVersion": "6", "labels": labels}
    running.on_event(DEPLOYMENT, "ADDED", {"metadata": metadata})
    await asyncio.sleep(1)
    running.on_event(DEPLOYMENT, "MODIFIED", {"metadata": {**metadata, "resourceVersion": "7", "labels": {}}})
    await asyncio.sleep(1)
    assert reconciler.keys == [("ns", "rag")] * 2
    await running.stop()


async def test_what_was_deleted_while_the_api_server_was_away_is_noticed_without_an_event():
    lists, reconciler = Lists(), Reconciler(pause=None)
    running = operator(lists, reconciler)
    await running.start()
    await asyncio.sleep(1)
    reconciler.keys.clear()
    lists.asked.clear()
    running.connections.advance(ApiServerEvent.FAILED)
    lists.deleted = True
    await asyncio.sleep(30)
    assert reconciler.keys == []
    running.connections.advance(ApiServerEvent.ANSWERED)
    await asyncio.sleep(1)
    assert reconciler.keys == [("ns", "rag")]
    await asyncio.sleep(30)
    assert lists.asked == [*WATCHED] * 2, "once at once, and once when all watches are back"
    await running.stop()
