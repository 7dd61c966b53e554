"""The operator's own life: what it learns at its start, and that it says so when it no longer works."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from controller.kube.client import ApiError
from controller.kube.kinds import DEPLOYMENT, KVCLUSTER, Kind
from controller.kube.link import Link
from controller.metrics import Metrics
from controller.operator import WATCHED, Operator
from controller.reconcile.inventory import Inventory, Key

pytestmark = pytest.mark.looptime


class Lists:
    """An API server that lists one KVCluster, once it is up."""

    def __init__(self, failures: int = 0) -> None:
        self.asked: list[Kind] = []
        self._failures = failures

    async def list(self, kind: Kind, namespace: str | None, selector: str) -> tuple[list[dict[str, object]], str]:
        self.asked.append(kind)
        if self._failures:
            self._failures -= 1
            raise ApiError(503, "ServiceUnavailable", "not yet")
        metadata = {"name": "rag", "namespace": "ns", "uid": "u", "resourceVersion": "1"}
        return ([{"metadata": metadata}] if kind == KVCLUSTER else []), "5"

    async def watch(
        self, kind: Kind, namespace: str | None, version: str, seconds: int
    ) -> AsyncIterator[dict[str, object]]:
        """Nothing happens."""
        await asyncio.sleep(seconds)
        yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "5"}}}


class Looks:
    """Whom the operator looked at."""

    def __init__(self, pause: float | None = 10.0) -> None:
        self.keys: list[Key] = []
        self._pause = pause

    async def reconcile(self, key: Key) -> float | None:
        self.keys.append(key)
        return self._pause


def operator(lists: Lists, looks: Looks) -> Operator:
    metrics = Metrics(CollectorRegistry())
    return Operator(
        lists, Link(lambda: 0.0), Inventory(), looks, metrics, namespaces=(), workers=2, rng=random.Random(1)  # type: ignore[arg-type]
    )  # fmt: skip


async def test_it_learns_what_there_is_before_it_looks_and_looks_again():
    lists, looks = Lists(), Looks()
    running = operator(lists, looks)
    await running.start()
    assert lists.asked == list(WATCHED)
    await asyncio.sleep(25)
    assert looks.keys == [("ns", "rag")] * 3
    running.check()
    await running.stop()


async def test_it_waits_for_an_api_server_that_is_not_up_yet():
    lists = Lists(failures=20)
    running = operator(lists, Looks())
    await running.start()
    assert len(lists.asked) == len(WATCHED) + 20, "only what failed is asked for again"
    await running.stop()


async def test_it_says_so_when_it_no_longer_works():
    running = operator(Lists(), Looks())
    running.check()
    await running.start()
    await running.stop()
    with pytest.raises(RuntimeError, match="queue has ended"):
        running.check()


async def test_a_cluster_misses_an_object_whose_label_was_taken_away():
    looks = Looks(pause=None)
    running = operator(Lists(), looks)
    await running.start()
    await asyncio.sleep(1)
    looks.keys.clear()
    labels = {"app.kubernetes.io/instance": "rag"}
    metadata = {"name": "rag-worker", "namespace": "ns", "uid": "d", "resourceVersion": "6", "labels": labels}
    running.seen(DEPLOYMENT, "ADDED", {"metadata": metadata})
    await asyncio.sleep(1)
    running.seen(DEPLOYMENT, "MODIFIED", {"metadata": {**metadata, "resourceVersion": "7", "labels": {}}})
    await asyncio.sleep(1)
    assert looks.keys == [("ns", "rag")] * 2
    await running.stop()
