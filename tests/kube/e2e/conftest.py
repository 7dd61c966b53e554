from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kube.e2e.support import World
from tests.kube.kubelet import FakeNode
from tests.kube.operator.support import Controller, prepared


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """An API server, a node that runs pods as processes, and the operator."""
    logs = tmp_path / "logs"
    async with prepared() as cluster:
        controller = Controller(cluster.operator_kubeconfig(tmp_path / "operator"), tmp_path / "controller.log")
        async with FakeNode(cluster.server, logs=logs) as node:
            await controller.start()
            try:
                yield World(cluster, node, controller)
            finally:
                await controller.stop()
