"""Whatever fails on the way, the operator arrives: nothing is left behind, nothing is made twice.

Not covered: requests that are answered with errors (test_faults.py); two operators at once, which the chart rules out.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.kube.operator.support import COLLECTED_WITHIN, OBJECTS, SPECS, Cluster, Controller, converged
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


@pytest.mark.parametrize("writes", [1, 7, 14])
async def test_killed_in_the_middle_of_creating(cluster: Cluster, controller: Controller, writes: int):
    await controller.kill_after_writes(cluster, writes)
    await cluster.create("rag", **SPECS["full"])
    await controller.killed()
    await controller.start()
    await converged(cluster, "rag")


@pytest.mark.parametrize("writes", [1, 3])
async def test_killed_in_the_middle_of_updating(cluster: Cluster, controller: Controller, writes: int):
    await cluster.create("rag", **SPECS["full"])
    await converged(cluster, "rag")
    await controller.kill_after_writes(cluster, writes)
    await cluster.patch("kvclusters", "rag", {"spec": {"autoscaling": None, "networkPolicy": {"enabled": False}}})
    await controller.killed()
    await controller.start()
    optional = {"horizontalpodautoscalers/rag-worker", "networkpolicies/rag-worker", "networkpolicies/rag-router"}
    await eventually(lambda: cluster.lacks(optional), "what is no longer wanted is gone", 30)
    await converged(cluster, "rag")


async def test_killed_while_a_cluster_is_deleted(cluster: Cluster, controller: Controller):
    await cluster.create("rag")
    await cluster.create("chat")
    await converged(cluster, "rag", "chat")
    await controller.kill()
    await cluster.delete("kvclusters", "rag")
    await cluster.collect_garbage(OBJECTS)
    await eventually(lambda: cluster.lacks(OBJECTS), "its objects go though no controller runs", COLLECTED_WITHIN)
    await controller.start()
    await converged(cluster, "chat")
    assert await cluster.lacks(OBJECTS)


async def test_the_api_server_is_restarted(cluster: Cluster):
    await cluster.create("rag")
    await converged(cluster, "rag")
    await cluster.backend.stop()
    await asyncio.sleep(1.0)
    await cluster.backend.start()
    await cluster.create("chat")
    await cluster.delete("services", "rag-worker")
    await converged(cluster, "rag", "chat", deleted=("services", "rag-worker"))


async def test_idle_clusters_cost_no_writes(cluster: Cluster):
    names = [f"c{number}" for number in range(10)]
    for name in names:
        await cluster.create(name)
    await converged(cluster, *names)
    await asyncio.sleep(2.0)  # whatever is still on its way
    before = len(cluster.backend.requests)
    await asyncio.sleep(6.0)
    requests = [request for request in cluster.backend.requests[before:] if request.user == cluster.operator]
    assert [request for request in requests if request.verb not in ("get", "list", "watch")] == []
    assert len(requests) <= 13, "the watches may be renewed once; nothing is polled"
