"""The Secret with the token of the routers' management port: made once, never overwritten, made again when it is gone.

Not covered: routers that ask for it (tests/kube/e2e/test_whole_path.py), the operator under exactly the chart's rights
(tests/deploy/test_install.py).
"""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from runtime.http.tokens import decoded
from tests.kube.operator.support import COLLECTED_WITHIN, Cluster, Controller
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

SECRET = "rag-router-management"
OWN = "a-token-of-my-own"


async def test_it_is_made_with_the_cluster_and_goes_with_it(cluster: Cluster, controller: Controller) -> None:
    body = await cluster.create("rag")
    await cluster.settled("rag")
    secret = await cluster.get("secrets", SECRET)
    (token,) = decoded(secret["data"])
    assert len(token) >= 32
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("KVCluster", body["metadata"]["uid"], True)
    deployment = await cluster.get("deployments", "rag-router")
    assert {"secret": {"defaultMode": 0o644, "secretName": SECRET}, "name": "kvcluster-management"} in deployment[
        "spec"
    ]["template"]["spec"]["volumes"]

    await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 2}}})
    await cluster.settled("rag")
    assert (await cluster.get("secrets", SECRET))["metadata"]["resourceVersion"] == secret["metadata"][
        "resourceVersion"
    ]
    assert token not in "\n".join(controller.log())
    for each in [await cluster.get("kvclusters", "rag"), *await cluster.events()]:
        assert token not in str(each)

    await cluster.delete("kvclusters", "rag")
    if cluster.backend.collects_garbage:
        await eventually(lambda: cluster.lacks({f"secrets/{SECRET}"}), "it goes with the cluster", COLLECTED_WITHIN)


async def test_one_that_is_there_already_is_used_and_never_changed(cluster: Cluster) -> None:
    data = {"token": base64.b64encode(OWN.encode()).decode()}
    head = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}}
    made = await cluster.apply_raw("secrets", {**head, "data": data})
    await cluster.create("rag")
    await cluster.settled("rag")
    found = await cluster.get("secrets", SECRET)
    assert (found["data"], found["metadata"]["resourceVersion"]) == (data, made["metadata"]["resourceVersion"])
    assert "ownerReferences" not in found["metadata"]


async def test_one_that_is_deleted_is_made_again(bare: Cluster, tmp_path: Path) -> None:
    kubeconfig = bare.operator_kubeconfig(tmp_path / "kubeconfig")
    controller = Controller(kubeconfig, tmp_path / "log")
    await controller.start()
    try:
        await bare.create("rag")
        await bare.settled("rag")
        first = await bare.get("secrets", SECRET)
        await bare.delete("secrets", SECRET)
        # Otherwise noticed within a minute: a change of the cluster is looked at at once.
        await controller.stop()
        await controller.start()

        async def back() -> bool:
            found = await bare.find("secrets", SECRET)
            return found is not None and found["data"] != first["data"]

        await eventually(back, "there is a new one", 30)
    finally:
        await controller.stop()


async def test_none_is_made_where_none_is_asked_for(cluster: Cluster) -> None:
    await cluster.create("rag", router={"management": {"auth": "none"}})
    await cluster.settled("rag")
    assert await cluster.find("secrets", SECRET) is None
    answer = await cluster.try_patch("kvclusters", "rag", {"spec": {"router": {"management": {"auth": "maybe"}}}})
    assert answer.status_code == 422
    assert "spec.router.management.auth" in answer.text
