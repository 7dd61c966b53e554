"""The API server fails in ways that only a fake one can be told to: the operator arrives all the same.

Not covered: an API server that is away or restarts (test_trouble.py), connections that go dead (test_network.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.kube.operator.support import OBJECTS, SPECS, Cluster, Controller, converged, prepared
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


@pytest.fixture
async def bare() -> AsyncIterator[Cluster]:
    """A fake API server without an operator."""
    async with prepared() as cluster:
        yield cluster


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


@pytest.mark.parametrize(
    ("status", "verb", "retry_after"),
    [
        pytest.param(409, "patch", None, id="conflicts"),
        pytest.param(429, "", 1, id="throttled"),
        pytest.param(500, "", None, id="errors"),
    ],
)
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


async def test_what_does_not_fit_kubernetes_schema_is_said_though_the_server_calls_it_its_own_error(cluster: Cluster):
    await cluster.create("rag", workers={"replicas": 2, "securityContext": {"nonsense": 1}})
    await eventually(lambda: cluster.condition("rag", "Degraded", "ApplyFailed"), "the status says so")
    message = next(each["message"] for each in await cluster.conditions("rag") if each["type"] == "Degraded")
    assert "Deployment/rag-worker" in message
    assert ".securityContext.nonsense: field not declared in schema" in message
    await eventually(lambda: cluster.has(OBJECTS - {"deployments/rag-worker"}), "the rest is made")
    await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"securityContext": None}}})
    await converged(cluster, "rag")


async def test_a_server_that_goes_on_failing_at_an_object_is_said_and_asked_again(cluster: Cluster):
    webhook = cluster.server.faults.fail(
        user=cluster.operator, resource="poddisruptionbudgets", verb="patch", status=500,
        message='Internal error occurred: failed calling webhook "policy.example.com": connection refused',
    )  # fmt: skip
    await cluster.create("rag")
    await eventually(lambda: cluster.condition("rag", "Degraded", "ApplyFailed"), "the status says so", 60)
    message = next(each["message"] for each in await cluster.conditions("rag") if each["type"] == "Degraded")
    assert "failed calling webhook" in message
    cluster.server.faults.remove(webhook)
    await converged(cluster, "rag")
    await eventually(lambda: cluster.condition("rag", "Degraded", "AsExpected"), "nothing is wrong any more")


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


async def test_failures_are_counted_by_cause(bare: Cluster, controller: Controller):
    bare.server.faults.fail(user=bare.operator, verb="patch", resource="configmaps", status=422)
    await bare.create("rag")

    async def seen() -> bool:
        return ("ConfigMap", "status", "apply") in await controller.metric("writes")

    await eventually(seen, "a write has failed", 30)
    bare.server.faults.clear()
    await eventually(lambda: bare.has(OBJECTS), "all objects are there", 60)
    await bare.settled("rag")
    refused = sum(each.user == bare.operator and each.status == 422 for each in bare.backend.requests)
    assert refused >= 1
    assert (await controller.metric("writes"))["ConfigMap", "status", "apply"] == refused
    assert (await controller.metric("api_failures"))["status", "write"] == refused
    assert (await controller.metric("reconciles"))["retry",] >= 1
