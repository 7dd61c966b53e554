"""The only pod of its kind is deleted under load: it serves until its replacement does, and nobody is refused.

Not covered: a pod that is killed, or lost with its node: requests in flight there fail (tests/e2e/test_failures.py).
"""

from __future__ import annotations

import pytest

from tests.kube.e2e.support import World, failures
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


@pytest.mark.parametrize("component", ["router", "worker"])
async def test_the_only_pod_deleted_under_load_refuses_nobody(world: World, component: str):
    await world.serve(workers=1, routers=1)
    (before,) = await world.pods(component)

    async def replaced() -> None:
        await world.api.delete("pods", before["metadata"]["name"])

        async def other() -> bool:
            return [pod["metadata"]["uid"] for pod in await world.pods(component)] not in (
                [],
                [before["metadata"]["uid"]],
            )

        await eventually(other, "another pod is there", 60)
        await world.rolled_out(component)

    records = await world.under_load(replaced)
    assert failures(records) == []
    assert len(records) > 20
