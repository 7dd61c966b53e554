"""Whatever fails on the way, the operator arrives: nothing is left behind, nothing is made twice."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.kube.operator.support import OBJECTS, Cluster, Controller, eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

SPECS = {
    "plain": {"workers": {"replicas": 2}},
    "full": {"autoscaling": {"max": 3}, "networkPolicy": {"enabled": True}},
}


async def converged(cluster: Cluster, *names: str, deleted: tuple[str, str] | None = None) -> None:
    """Every cluster has its objects, each made once (but for one that was `deleted`); none of one that is gone."""
    for name in names:
        await eventually(lambda name=name: cluster.has(OBJECTS, name), f"{name} is complete", 60)
        await cluster.settled(name, 60)
    uids = {(await cluster.get("kvclusters", name))["metadata"]["uid"] for name in names}

    async def no_orphans() -> bool:
        return await cluster.owners() <= uids

    await eventually(no_orphans, "nothing belongs to a cluster that is gone", 30)
    made = Counter(
        (each.resource, each.name)
        for each in cluster.server.requests
        if each.user == cluster.operator and each.verb == "patch" and each.status == 201
    )
    assert [name for name, times in made.items() if times > 1 and name != deleted] == [], "made twice"


@pytest.mark.parametrize("writes", [1, 3, 7, 12, 14])
async def test_killed_in_the_middle_of_creating(cluster: Cluster, controller: Controller, writes: int):
    await controller.kill_after_writes(cluster, writes)
    await cluster.create("rag", **SPECS["full"])
    await controller.killed()
    await controller.start()
    await converged(cluster, "rag")


@pytest.mark.parametrize("writes", [1, 2, 3])
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
    await eventually(lambda: cluster.lacks(OBJECTS), "its objects go though no controller runs", 30)
    await controller.start()
    await converged(cluster, "chat")
    assert await cluster.lacks(OBJECTS)


async def test_the_api_server_is_restarted(cluster: Cluster):
    await cluster.create("rag")
    await converged(cluster, "rag")
    await cluster.server.stop()
    await asyncio.sleep(1.0)
    await cluster.server.start()
    await cluster.create("chat")
    await cluster.delete("services", "rag-worker")
    await converged(cluster, "rag", "chat", deleted=("services", "rag-worker"))


async def test_the_watches_are_cut_and_their_history_is_gone(cluster: Cluster):
    await cluster.create("rag")
    await converged(cluster, "rag")
    for _ in range(3):
        cluster.server.faults.cut_watches()
        cluster.server.compact()
        await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 3}}})
        await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 2}}})
    await cluster.create("chat", **SPECS["full"])
    await converged(cluster, "rag", "chat")
    assert (await cluster.get("deployments", "rag-worker"))["spec"]["replicas"] == 2


@pytest.mark.parametrize(("status", "verb", "retry_after"), [(409, "patch", None), (429, "", 1), (500, "", None)])
async def test_a_quarter_of_all_requests_fail(cluster: Cluster, status: int, verb: str, retry_after: int | None):
    cluster.server.faults.fail(
        user=cluster.operator, verb=verb, status=status, probability=0.25, retry_after=retry_after
    )
    await cluster.create("rag", **SPECS["full"])
    await cluster.create("chat", **SPECS["plain"])
    await converged(cluster, "rag", "chat")
    await cluster.patch("kvclusters", "rag", {"spec": {"autoscaling": None}})
    await eventually(lambda: cluster.lacks({"horizontalpodautoscalers/rag-worker"}), "it follows all the same", 60)
    await cluster.delete("kvclusters", "chat")
    cluster.server.faults.clear()
    await converged(cluster, "rag")


async def test_what_the_server_refuses_for_good_is_said_and_the_rest_is_made(cluster: Cluster):
    refusal = cluster.server.faults.fail(
        user=cluster.operator, resource="poddisruptionbudgets", verb="patch", status=403,
        message='poddisruptionbudgets.policy "rag-router" is forbidden: exceeded quota: few',
    )  # fmt: skip
    await cluster.create("rag")
    await eventually(lambda: cluster.condition("rag", "Degraded", "ApplyFailed"), "the status says so")
    message = next(each["message"] for each in await cluster.conditions("rag") if each["type"] == "Degraded")
    assert "exceeded quota: few" in message
    budgets = {"poddisruptionbudgets/rag-router", "poddisruptionbudgets/rag-worker"}
    await eventually(lambda: cluster.has(OBJECTS - budgets), "the rest is made")
    cluster.server.faults.remove(refusal)
    await converged(cluster, "rag")


async def test_idle_clusters_cost_no_writes(cluster: Cluster):
    names = [f"c{number}" for number in range(10)]
    for name in names:
        await cluster.create(name)
    await converged(cluster, *names)
    await asyncio.sleep(2.0)  # whatever is still on its way
    before = len(cluster.server.requests)
    await asyncio.sleep(6.0)
    requests = [request for request in cluster.server.requests[before:] if request.user == cluster.operator]
    assert [request for request in requests if request.verb not in ("get", "list", "watch")] == []
    assert len(requests) <= 13, "the watches may be renewed once; nothing is polled"
