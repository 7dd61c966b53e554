"""The `api` fixture: a Kubernetes API server, fake or real."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.kube.apiserver import FakeApiServer
from tests.kube.backends import ASSETS, Backend, FakeBackend, available
from tests.kube.real import RealBackend, real_api_server
from tests.kube.samples import WIDGETS, widget_definition

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@pytest.fixture(scope="session")
def real_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBackend]:
    """One real API server for the whole run."""
    with real_api_server(Path(os.environ[ASSETS]), tmp_path_factory.mktemp("kube-apiserver")) as backend:
        yield backend


@pytest.fixture(params=available())
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each API server there is: a fake one for each test; the real one where KUBEBUILDER_ASSETS names its folder."""
    if request.param == "real":
        yield request.getfixturevalue("real_backend")
        return
    server = FakeApiServer()
    await server.start()
    try:
        yield FakeBackend(server)
    finally:
        await server.stop()


@pytest.fixture
async def fake() -> AsyncIterator[FakeApiServer]:
    """The fake API server, for what a bare API server cannot do."""
    server = FakeApiServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def client(api: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """The administrator's client."""
    async with api.client() as client:
        yield client


@pytest.fixture
async def ns(client: httpx.AsyncClient) -> str:
    """A namespace of the test's own."""
    answer = await client.post("/api/v1/namespaces", json={"metadata": {"generateName": "test-"}})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["metadata"]["name"])


@pytest.fixture
async def widgets(client: httpx.AsyncClient, ns: str) -> str:
    """The path of widgets in the test's namespace, once they are served."""
    answer = await client.post(DEFINITIONS, json=widget_definition())
    assert answer.status_code in (201, 409), answer.text
    path = f"{WIDGETS}/namespaces/{ns}/widgets"
    async with asyncio.timeout(30):
        while (await client.get(path)).status_code != 200:  # noqa: ASYNC110  nothing tells when
            await asyncio.sleep(0.05)
    return path
