"""A router under traffic while everything happens to the API server that names its workers: no request is lost.

Covered: cuts, restarts, compaction and rights at a fake API server. Not covered: a real one, which gives a Service
no loopback endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from controller.api.model import KVClusterSpec
from controller.objects.access import build_router_rbac
from controller.objects.names import Cluster as Owner
from controller.objects.names import Release
from router.discovery.kubernetes import KubernetesDiscovery, find_service
from runtime.backoff import Backoff
from runtime.kube.listwatch import ListWatchPolicy
from tests.kube.apiserver import FakeApiServer
from tests.kube.backends import granted, used
from tests.kube.relay import Relay
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.router.fakes import FakeWorker, fake_workers, good

pytestmark = pytest.mark.process

QUICK = ListWatchPolicy(
    shortest_watch=1, longest_watch=2, slack=1.0, settled=0.1, relist=300.0, retry=Backoff(0.01, 0.2)
)
ACCOUNT = "system:serviceaccount:ns:rag-router"
_, ROLE, BINDING = build_router_rbac(Owner("rag", "ns", "u", KVClusterSpec(), Release("image")))
SLICES = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"


class Cluster:
    """The fake API server as a cluster's other parts use it."""

    def __init__(self, api: FakeApiServer, client: httpx.AsyncClient) -> None:
        self.api = api
        self._client = client

    async def put(self, name: str, worker: FakeWorker, pod: str, **conditions: bool) -> None:
        """Create or replace the slice that names this worker."""
        ports = [{"name": "http", "port": worker.port, "protocol": "TCP"}]
        made = endpoint_slice(name, endpoint("127.0.0.1", pod, **conditions), ports=ports)
        del made["metadata"]["resourceVersion"]
        answer = await self._client.put(f"{self.api.url}{SLICES}/{name}", json=made)
        if answer.status_code == 404:
            answer = await self._client.post(f"{self.api.url}{SLICES}", json=made)
        answer.raise_for_status()

    async def delete(self, name: str) -> None:
        (await self._client.delete(f"{self.api.url}{SLICES}/{name}")).raise_for_status()

    async def create(self, path: str, body: dict[str, Any]) -> None:
        (await self._client.post(self.api.url + path, json=body)).raise_for_status()

    async def grant(self) -> None:
        """What the controller grants a router."""
        rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/ns"
        for plural, item in (("roles", ROLE), ("rolebindings", BINDING)):
            # Without its owner, which is not there: the garbage collector would take it away.
            await self.create(f"{rbac}/{plural}", {**item, "metadata": {"name": item["metadata"]["name"]}})


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    api = FakeApiServer(bookmark_seconds=0.2)
    await api.start()
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            made = Cluster(api, client)
            await made.create("/api/v1/namespaces", {"metadata": {"name": "ns"}})
            yield made
    finally:
        await api.stop()


@asynccontextmanager
async def routing(
    start_router: StartRouter, tmp_path: Path, made: Cluster
) -> AsyncIterator[tuple[Relay, RunningRouter]]:
    """A router that reaches the cluster's API server through a relay, with its service account's rights."""
    relay = Relay(lambda: int(made.api.url.rpartition(":")[2]))
    await relay.start()
    path = made.api.kubeconfig(tmp_path / "kubeconfig", ACCOUNT, "ns")
    config = yaml.safe_load(path.read_text())
    config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{relay.port}"
    path.write_text(yaml.safe_dump(config))
    source = KubernetesDiscovery(await find_service("workers", None, path), policy=QUICK)
    try:
        async with start_router(source=source, retry_deadline=60) as router:
            yield relay, router
    finally:
        await relay.stop()


def known(router: RunningRouter) -> set[str]:
    return {status.url for status in router.router.fleet.workers(0.0)}


async def test_a_router_without_rights_says_what_to_grant(start_router: StartRouter, tmp_path: Path) -> None:
    async with (
        fake_workers(good) as (worker,),
        cluster() as made,
        routing(start_router, tmp_path, made) as (_, router),
    ):
        await made.put("a", worker, "w-1")
        await until(lambda: router.metric("discovery_failures_total", cause="forbidden") > 0)
        reason = (await router.management.get("/ready")).json()["reason"]
        assert "grant list and watch on endpointslices (discovery.k8s.io) in namespace ns" in reason
        await made.grant()
        await router.ready(1)


async def test_whatever_happens_to_the_api_server_no_request_is_lost(start_router: StartRouter, tmp_path: Path) -> None:
    async with (
        fake_workers(good, good, good) as (one, two, three),
        cluster() as made,
        routing(start_router, tmp_path, made) as (relay, router),
    ):
        api, faults = made.api, made.api.faults
        await made.grant()
        await made.put("a", one, "w-1")
        statuses: list[int] = []
        ending = asyncio.Event()

        async def client() -> None:
            while not ending.is_set():
                statuses.append((await router.complete()).status_code)

        async def some() -> None:
            enough = len(statuses) + 20
            await until(lambda: len(statuses) >= enough)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await some()

        # Watches cut while a pod comes.
        faults.cut_watches()
        await made.put("b", two, "w-2")
        await until(lambda: known(router) == {one.url, two.url})

        # While it does not answer, its history is compacted away: 410, and a deletion that no event tells of.
        answers = asyncio.Event()
        held = faults.hold(answers, verb="watch", resource="endpointslices")
        faults.cut_watches()
        await until(lambda: held.hits > 0)
        await made.delete("b")
        await made.put("c", three, "w-3")
        api.compact()
        answers.set()
        await until(lambda: known(router) == {one.url, three.url})
        assert router.metric("discovery_relists_total", reason="expired") == 1
        await some()

        # It asks for patience and fails, while a pod comes and goes.
        faults.fail(verb="watch", resource="endpointslices", status=429, retry_after=1, times=2)
        faults.fail(verb="list", resource="endpointslices", status=500, times=2)
        faults.cut_watches()
        await made.put("b", two, "w-5")
        await until(lambda: two.url in known(router))
        await made.delete("b")
        await until(lambda: known(router) == {one.url, three.url})
        await until(lambda: router.metric("discovery_failures_total", cause="throttled") == 2)
        await some()
        faults.clear()

        # A restart, in which a pod becomes terminating.
        await api.stop()
        await until(lambda: router.metric("discovery_failures_total", cause="connect") > 0)
        await some()
        await api.start()
        await made.put("a", one, "w-1", ready=False, serving=True, terminating=True)
        await until(lambda: router.candidates() == 1)
        await some()

        # A network that goes dead without a word, in which it goes and another one comes.
        await until(lambda: router.router.management.discovery().error == "")
        silent = router.metric("discovery_failures_total", cause="silent")
        relay.freeze()
        await made.delete("a")
        await made.put("b", two, "w-4")
        await until(lambda: known(router) == {two.url, three.url})
        assert router.metric("discovery_failures_total", cause="silent") > silent
        await some()

        ending.set()
        await asyncio.gather(*clients)
        assert set(statuses) == {200}
        status = (await router.management.get("/status")).json()["discovery"]
        assert status["healthy"] is True
        assert used(api.requests, ACCOUNT) == granted(ROLE["rules"]), "it is granted what it asks for, and no more"
