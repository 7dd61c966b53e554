"""Router pods with Envoy as their data plane, as the operator makes them, with a real Envoy: no request fails while
routers, workers and Envoys come and go.

Not covered: certificates and keys, which are Secrets, and the fake node has none (tests/envoy/test_rendered_pod.py);
what Envoy does with requests (tests/envoy/test_data_plane.py).
"""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from tests.kube.e2e.support import World, failures
from tests.kube.kubelet.process import Isolation, isolation
from tests.processes import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.envoy,
    pytest.mark.timeout(300),
    pytest.mark.skipif(isolation() is not Isolation.FULL, reason="only root can give containers their volumes"),
]


FROZEN = 8.0
"""Seconds: several of the readiness probe's periods."""


async def ready(world: World, pod: str) -> bool:
    conditions = (await world.api.get("pods", pod))["status"]["conditions"]
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


async def picks(world: World) -> float:
    """How many requests the routers have decided."""
    total = 0.0
    async with httpx.AsyncClient(trust_env=False, headers=await world.management_headers()) as client:
        for pod in await world.pods("router"):
            text = (await client.get(f"http://{pod['status']['podIP']}:9000/metrics")).text
            lines = [each for each in text.splitlines() if each.startswith("kvcluster_router_picks_total")]
            total += sum(float(each.rpartition(" ")[2]) for each in lines)
    return total


async def test_requests_flow_through_envoy_while_everything_changes(world: World):
    await world.serve(workers=2, router={"replicas": 2, "dataPlane": "envoy"})

    async def replace_the_routers() -> None:
        await world.restart("router")
        await world.rolled_out("router")

    async def freeze_a_router() -> None:
        pod = (await world.pods("router"))[0]["metadata"]["name"]
        world.node.kill(pod, signal.SIGSTOP, container="router")
        await asyncio.sleep(FROZEN)
        assert await ready(world, pod), "its Envoy goes on without it"
        world.node.kill(pod, signal.SIGKILL, container="router")

    records = await world.under_load(lambda: world.scale(3), replace_the_routers, freeze_a_router)
    assert failures(records) == []
    assert len(records) > 50
    await eventually(lambda: world.api.condition("rag", "RouterAvailable", "AllReady"), "the router is back", 60)
    assert await picks(world) > 0
