"""The way to the API server goes dead, or away: what changes meanwhile is found out soon, and said once.

Not covered: answers that are errors (test_faults.py); routers behind such a network (tests/router/kubernetes).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from tests.kube.operator.support import OBJECTS, Cluster, Controller
from tests.kube.relay import Relay
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


@pytest.fixture
async def relay(bare: Cluster, tmp_path: Path) -> AsyncIterator[Relay]:
    """Between the operator and the API server."""
    made = Relay(lambda: int(bare.backend.url.rpartition(":")[2]))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def behind(bare: Cluster, relay: Relay, tmp_path: Path) -> AsyncIterator[Controller]:
    """The operator, behind the relay."""
    file = bare.operator_kubeconfig(tmp_path / "kubeconfig")
    config = yaml.safe_load(file.read_text())
    config["clusters"][0]["cluster"]["server"] = f"{bare.backend.url.partition(':')[0]}://127.0.0.1:{relay.port}"
    file.write_text(yaml.safe_dump(config))
    controller = Controller(file, tmp_path / "controller.log")
    await controller.start()
    yield controller
    await controller.stop()


async def test_connections_that_are_dead_without_a_word_are_found_out(bare: Cluster, relay: Relay, behind: Controller):
    await bare.create("rag")
    await eventually(lambda: bare.has(OBJECTS), "it works", 30)
    await bare.settled("rag")
    relay.freeze()
    await bare.create("late")
    await bare.patch("services", "rag-router", {"spec": {"selector": {"app.kubernetes.io/name": "nobody"}}})
    await bare.delete("configmaps", "rag-worker")

    async def repaired() -> bool:
        service = await bare.get("services", "rag-router")
        return service["spec"]["selector"]["app.kubernetes.io/name"] == "kvcluster" and await bare.has(OBJECTS)

    await eventually(lambda: bare.has(OBJECTS, "late"), "a new KVCluster is served", 20)
    await eventually(repaired, "what was changed by hand is put right", 15)


async def test_an_api_server_that_is_away_is_said_once(cluster: Cluster, controller: Controller):
    await cluster.create("rag")
    await eventually(lambda: cluster.has(OBJECTS), "it works", 30)
    await cluster.settled("rag")

    before = len(controller.log())

    def said(*events: str) -> list[str]:
        return [line for line in controller.log()[before:] if any(f" {each} " in f"{line} " for each in events)]

    async def lost() -> bool:
        return bool(said("api_server_lost"))

    async def restored() -> bool:
        return bool(said("api_server_restored"))

    await cluster.backend.stop()
    await eventually(lost, "the log says that the API server is away")
    await asyncio.sleep(5)  # many a request fails meanwhile
    await cluster.backend.start()
    await eventually(restored, "the log says that it is back", 30)
    await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 3}}})

    async def follows() -> bool:
        return bool((await cluster.get("deployments", "rag-worker"))["spec"]["replicas"] == 3)

    await eventually(follows, "it works again", 30)
    assert len(said("api_server_lost")) == len(said("api_server_restored")) == 1
    # A real server that has just started knows no roles for a moment.
    unknown = [line for line in said("error", "warning") if not (cluster.backend.real and "403 Forbidden" in line)]
    assert unknown == said("api_server_lost"), "and nothing else is said of it"
