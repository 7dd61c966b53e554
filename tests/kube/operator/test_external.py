"""Engines that somebody else runs, at an API server: what has no meaning is refused there, and a KVCluster that changes
to this engine type and back leaves alone what is not its own.

Not covered: the objects in detail (tests/controller/objects/test_external.py), a kubelet's pods, the routers.
"""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.kube.operator.support import OBJECTS, Cluster
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

EXTERNAL = {
    "model": {"name": "m"},
    "engine": {"type": "external", "external": {"selector": {"matchLabels": {"app": "llama"}}, "ports": [8000]}},
}
OURS = ("deployments", "poddisruptionbudgets", "configmaps")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(shared: Cluster) -> Cluster:
    return await shared.add_namespace("external")


async def test_switching_to_it_and_back_moves_what_is_ours_alone(cluster: Cluster) -> None:
    async def selects(**labels: str) -> bool:
        found = await cluster.find("services", "rag-worker")
        return found is not None and all(found["spec"]["selector"].get(key) == value for key, value in labels.items())

    async def gone() -> bool:
        return not any([await cluster.find(plural, "rag-worker") for plural in OURS])

    theirs = {
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "llama", "namespace": cluster.namespace, "labels": {"app": "llama"}},
    }  # fmt: skip
    await cluster.apply_raw("configmaps", theirs)
    await cluster.create("rag")
    await eventually(lambda: cluster.has(OBJECTS), "the workers are the operator's", 60)
    await cluster.patch("kvclusters", "rag", {"spec": EXTERNAL})
    await eventually(gone, "the operator's workers go", 60)
    await eventually(lambda: selects(app="llama"), "their pods are followed")
    await eventually(lambda: cluster.condition("rag", "WorkersAvailable", "NoRouter"), "no router can say", 60)
    answer = await cluster.try_patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 2}}})
    assert answer.status_code == 422
    assert answer.json()["details"]["causes"][0]["field"] == "spec.workers.replicas"
    assert "whoever runs them decides this" in answer.json()["message"]

    back = {"engine": {"type": "emulator", "external": None}}
    await cluster.patch("kvclusters", "rag", {"spec": back})
    await eventually(lambda: cluster.has(OBJECTS), "the workers are the operator's again", 60)
    await eventually(lambda: selects(**{"app.kubernetes.io/instance": "rag"}), "and their Service leads to them")
    assert await cluster.find("configmaps", "llama") is not None
    await cluster.delete("kvclusters", "rag")
