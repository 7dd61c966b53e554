from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.kube.backends import Backend, available
from tests.kube.operator.support import Cluster, Controller, prepared


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=available())
async def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """An API server with an operator, for a module whose tests each take a namespace of their own."""
    folder = tmp_path_factory.mktemp("operator")
    backend = request.getfixturevalue("real_backend") if request.param == "real" else None
    async with prepared(backend) as cluster:
        controller = Controller(cluster.operator_kubeconfig(folder / "kubeconfig"), folder / "controller.log")
        await controller.start()
        yield cluster
        await controller.stop()


@pytest.fixture
async def bare(api: Backend) -> AsyncIterator[Cluster]:
    """An API server without an operator, and a namespace of the test's own."""
    async with prepared(api) as server:
        if not api.real:
            yield server
            return
        cluster = await server.add_namespace(f"serving-{secrets.token_hex(4)}")
        yield cluster
        for each in await cluster.list("kvclusters"):
            await cluster.delete("kvclusters", each["metadata"]["name"])


@pytest.fixture
async def controller(bare: Cluster, tmp_path: Path) -> AsyncIterator[Controller]:
    """The operator, running."""
    controller = Controller(bare.operator_kubeconfig(tmp_path / "kubeconfig"), tmp_path / "controller.log")
    await controller.start()
    yield controller
    await controller.stop()


@pytest.fixture
async def cluster(bare: Cluster, controller: Controller) -> Cluster:
    """An API server with an operator."""
    return bare
