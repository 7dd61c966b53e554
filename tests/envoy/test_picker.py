"""The endpoint picker as a real Envoy asks it.

Not covered: every message that a gateway might send (tests/router/picker), and the times that it takes (bench).
"""

from __future__ import annotations

import pytest

from tests.envoy.conftest import StartGateway
from tests.envoy.gateway import Modes
from tests.router.fakes import fake_workers, good

pytestmark = pytest.mark.envoy


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param(Modes(), id="full duplex"),
        pytest.param(Modes(request_body="BUFFERED", response_body="NONE"), id="buffered"),
    ],
)
async def test_get_and_post_reach_a_worker(start_gateway: StartGateway, modes: Modes) -> None:
    async with fake_workers(good, good) as workers, start_gateway(workers, modes) as behind:
        listed = await behind.gateway.client.get("/v1/models")
        answer = await behind.complete()
        assert (listed.status_code, answer.status_code) == (200, 200), (listed.text, answer.text)
        assert sum(len(worker.received) for worker in workers) == 2
