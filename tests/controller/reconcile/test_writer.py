"""What a plan's outcome says of what was done."""

from __future__ import annotations

from typing import Any

from controller.api.model import KVClusterSpec
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Release
from controller.reconcile.inventory import Inventory
from controller.reconcile.plan import Plan
from controller.reconcile.writer import Writer
from controller.status.reasons import ConditionReason

CLUSTER = Cluster("rag", "ns", "u", KVClusterSpec(), Release("image"))


class Server:
    """Has objects of someone else's under these names, and takes everything that is applied."""

    def __init__(self, *taken: str) -> None:
        self._taken = taken

    async def get(self, kind: Any, namespace: str, name: str) -> dict[str, Any] | None:
        metadata = {"name": name, "namespace": namespace, "uid": "theirs", "resourceVersion": "1"}
        return {"metadata": metadata} if f"{kind.name}/{name}" in self._taken else None

    async def apply(self, manifest: dict[str, Any], manager: str = "") -> dict[str, Any]:
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "ours", "resourceVersion": "2"}}


async def outcome(server: Server):  # type: ignore[no-untyped-def]
    plan = Plan(apply=tuple(item for item in desired_objects(CLUSTER) if item["kind"] == "ConfigMap"))
    return await Writer(server, Inventory()).carry_out(plan, CLUSTER)  # type: ignore[arg-type]


async def test_a_name_that_is_taken_is_no_progress():
    result = await outcome(Server("ConfigMap/rag-worker"))
    assert result.written == 1
    (problem,) = result.problems
    assert (problem.reason, problem.object) == (ConditionReason.NAME_CONFLICT, "ConfigMap/rag-worker")
    assert "belongs to no KVCluster" in problem.message
    assert (await outcome(Server())).written == 2
