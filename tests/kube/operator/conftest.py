from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kube.operator.support import OPERATOR, Cluster, Controller, prepared


@pytest.fixture
async def bare() -> AsyncIterator[Cluster]:
    """An API server without an operator."""
    async with prepared() as cluster:
        yield cluster


@pytest.fixture
async def controller(bare: Cluster, tmp_path: Path) -> AsyncIterator[Controller]:
    """The operator, running."""
    controller = Controller(bare.server.kubeconfig(tmp_path / "kubeconfig", OPERATOR), tmp_path / "controller.log")
    await controller.start()
    yield controller
    await controller.stop()


@pytest.fixture
async def cluster(bare: Cluster, controller: Controller) -> Cluster:
    """An API server with an operator."""
    return bare
