"""Router pods with Envoy as their data plane, as the operator makes them, with a real Envoy: no request fails while
routers, workers and Envoys come and go.

Not covered: certificates and keys, which are Secrets, and the fake node has none (tests/envoy/test_rendered_pod.py);
what Envoy does with requests (tests/envoy/test_data_plane.py).
"""

from __future__ import annotations

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


async def test_requests_flow_through_envoy_while_everything_changes(world: World):
    await world.serve(workers=2, routers=2, router={"replicas": 2, "dataPlane": "envoy"})

    async def restart(component: str) -> None:
        await world.restart(component)
        await world.rolled_out(component)

    records = await world.under_load(
        lambda: world.scale(3), lambda: restart("router"), lambda: restart("worker"), lambda: world.scale(1)
    )
    assert failures(records) == []
    assert len(records) > 50
    assert await picks(world) > 0
