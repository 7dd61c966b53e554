"""What the controller's log holds, and what it does not.

Not covered: what is logged of an API server that is away (test_network.py), the format (tests/runtime).
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.kube.operator.support import Cluster, Controller
from tests.processes import eventually, free_port

pytestmark = pytest.mark.process


async def test_a_probe_is_no_line_in_the_log(bare: Cluster, tmp_path: Path):
    health, log = f"http://127.0.0.1:{free_port()}/healthz", tmp_path / "controller.log"
    port = f"--health-port={httpx.URL(health).port}"
    controller = Controller(bare.operator_kubeconfig(tmp_path / "kubeconfig"), log, port)
    await controller.start()
    async with httpx.AsyncClient(trust_env=False) as client:

        async def alive() -> bool:
            try:
                return (await client.get(health)).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(alive, "the controller answers its probe", 30)
    await controller.stop()
    text = log.read_text()
    assert "controller_started" in text
    assert "healthz" not in text
