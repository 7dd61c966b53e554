"""The operator and a gateway's custom resources at an API server, fake and real: objects come with their CRDs, go with
them, follow the spec, and what a gateway says of the pool becomes a condition.

Not covered: what is in a pool's status in detail (tests/controller/status/test_gateway.py), a gateway itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kube.gateway_api import install, pool_definition, route_definition, uninstall
from tests.kube.operator.support import MERGE, OBJECTS, Cluster, Controller
from tests.processes import eventually

pytestmark = pytest.mark.process

PARENT = {"name": "front", "namespace": "gateways", "sectionName": "https"}
MADE = ("services/rag-router-picker", "inferencepools/rag-worker", "httproutes/rag-router-gateway")


def said(status: str, reason: str, message: str) -> dict[str, Any]:
    """What a gateway writes about a pool."""
    condition = {
        "type": "Accepted", "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-03-01T12:00:00Z",
    }  # fmt: skip
    return {"parents": [{"parentRef": {"name": "front", "namespace": "gateways"}, "conditions": [condition]}]}


async def test_a_pool_comes_with_its_crd_follows_the_spec_and_tells_what_the_gateway_says(
    bare: Cluster, tmp_path: Path
) -> None:
    async def has(*names: str) -> bool:
        return all([await bare.find(*name.split("/")) is not None for name in names])

    async def lacks(*names: str) -> bool:
        return not any([await bare.find(*name.split("/")) is not None for name in names])

    def says(reason: str) -> Any:
        return lambda: bare.condition("rag", "GatewayAccepted", reason)

    client = bare._client
    controller = Controller(bare.operator_kubeconfig(tmp_path / "kubeconfig"), tmp_path / "log", "--api-recheck=0.5")
    await controller.start()
    try:
        await bare.create("rag", gateway={"inferencePool": True, "parentRefs": [PARENT]})
        await eventually(says("MissingApi"), "the missing CRD is named", 60)
        await eventually(lambda: bare.has(OBJECTS), "nothing else is disturbed")

        await install(client, pool_definition(), route_definition())
        await eventually(lambda: has(*MADE), "the objects come without a restart", 60)
        await eventually(says("WaitingForGateway"), "no gateway has said anything", 60)
        pool = await bare.get("inferencepools", "rag-worker")
        assert pool["spec"]["endpointPickerRef"] == {
            "group": "", "kind": "Service", "name": "rag-router-picker", "port": {"number": 9002},
            "failureMode": "FailClose",
        }  # fmt: skip
        assert pool["metadata"]["ownerReferences"][0]["name"] == "rag"
        route = await bare.get("httproutes", "rag-router-gateway")
        assert route["spec"]["rules"][0]["backendRefs"][0]["kind"] == "InferencePool"

        path = f"{bare.path('inferencepools', 'rag-worker')}/status"
        await client.patch(path, json={"status": said("False", "NotSupported", "no extension")}, headers=MERGE)
        await eventually(says("GatewayRefused"), "the refusal is told", 60)
        (found,) = [each for each in await bare.conditions("rag") if each["type"] == "GatewayAccepted"]
        assert found["message"] == "Gateway gateways/front (NotSupported): no extension."
        await client.patch(path, json={"status": said("True", "Accepted", "")}, headers=MERGE)
        await eventually(says("GatewayAccepted"), "so is the acceptance", 60)

        await bare.patch("kvclusters", "rag", {"spec": {"gateway": {"failureMode": "FailOpen", "parentRefs": []}}})
        await eventually(lambda: lacks("httproutes/rag-router-gateway"), "the route goes with its parents", 60)

        async def opened() -> bool:
            spec = (await bare.get("inferencepools", "rag-worker"))["spec"]
            return bool(spec["endpointPickerRef"]["failureMode"] == "FailOpen")

        await eventually(opened, "the pool follows the spec", 60)
        assert (await bare.get("inferencepools", "rag-worker"))["status"]["parents"], "the gateway's words stay"

        await uninstall(client, pool_definition())
        await eventually(says("MissingApi"), "a CRD that goes away is named", 60)
        assert await bare.has(OBJECTS)
    finally:
        await controller.stop()
        await uninstall(client, pool_definition())
        await uninstall(client, route_definition())
