from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.kube.operator.support import OPERATOR, Cluster, Controller, prepared


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """An API server with an operator, for a module whose tests each take a namespace of their own."""
    folder = tmp_path_factory.mktemp("operator")
    async with prepared() as cluster:
        controller = Controller(cluster.server.kubeconfig(folder / "kubeconfig", OPERATOR), folder / "controller.log")
        await controller.start()
        yield cluster
        await controller.stop()


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
