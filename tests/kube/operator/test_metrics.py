"""The controller's counters are what an API server saw of it: writes by kind and outcome, drift that was repaired, and
the ages of kopf's watches.

Not covered: requests that fail (test_faults.py), gauges of KVClusters (tests/controller/test_metrics.py), and the
outcomes of reconciles (tests/controller/test_operator.py).
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.kube.operator.support import OBJECTS, Cluster, Controller
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

KINDS = {
    "kvclusters": "KVCluster",
    "serviceaccounts": "ServiceAccount",
    "roles": "Role",
    "rolebindings": "RoleBinding",
    "configmaps": "ConfigMap",
    "secrets": "Secret",
    "services": "Service",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "deployments": "Deployment",
    "events": "Event",
}
NEVER_WATCHED = ("events", "secrets")


async def repairs(controller: Controller, **expected: int) -> bool:
    return await controller.metric("drift_repairs") == {(kind,): number for kind, number in expected.items()}


async def test_they_are_what_the_server_saw(cluster: Cluster, controller: Controller):
    await cluster.create("rag")
    await eventually(lambda: cluster.has(OBJECTS), "all objects are there", 60)
    await cluster.settled("rag")
    assert await controller.metric("drift_repairs") == {}, "nothing has drifted yet"

    # Someone changes one object, deletes another, and the owner changes the spec, which is no drift.
    await cluster.patch("deployments", "rag-worker", {"spec": {"replicas": 7}})
    await cluster.delete("services", "rag-router-management")
    await eventually(lambda: repairs(controller, Deployment=1, Service=1), "both are back", 30)
    await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 3}}})
    await cluster.settled("rag")
    assert await repairs(controller, Deployment=1, Service=1)

    verbs = {"patch": "apply", "post": "create", "create": "create", "delete": "delete"}
    writes = Counter(
        (KINDS[each.resource.partition("/")[0]], "done", verbs[each.verb])
        for each in cluster.backend.requests
        if each.user == cluster.operator and each.verb in verbs and each.status < 300
    )
    assert await controller.metric("writes") == writes
    ages = await controller.metric("watch_age_seconds")
    assert {(plural,) for plural in (*KINDS, "pods") if plural not in NEVER_WATCHED} <= ages.keys()
    assert max(ages.values()) < 60, "the slowest has begun, or brought something, in this test"
    [found] = [key for key in await controller.metric("condition") if key[0] == "Ready"]
    assert found[1:3] == ("rag", cluster.namespace)
