"""A router whose workers come from EndpointSlices.

Covered: readiness, pods that restart or are replaced, an API server that is away. Not covered: an API server with
storage and RBAC (test_fake_cluster.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer
from router.discovery.kubernetes import KubernetesDiscovery, find_service
from runtime.backoff import Backoff
from runtime.kube.listwatch import ListWatchPolicy
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.discovery.scripted import ScriptedApi
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.router.fakes import FakeWorker, fake_workers, good
from tests.runtime.kube.objects import status

pytestmark = pytest.mark.process

QUICK = ListWatchPolicy(retry=Backoff(0.002, 0.02), settled=0.02)
KEYS = block_keys(range(320), 16)
CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]


def slice_of(worker: FakeWorker, pod: str, **conditions: bool) -> dict[str, Any]:
    """The slice that names this worker alone: on one machine its port tells it from others."""
    ports = [{"name": "http", "port": worker.port}]
    return endpoint_slice(f"s-{worker.port}", endpoint("127.0.0.1", pod, **conditions), ports=ports)


@asynccontextmanager
async def in_cluster(
    start_router: StartRouter, tmp_path: Path, *, policy: ListWatchPolicy = QUICK, up: bool = True, **settings: Any
) -> AsyncIterator[tuple[ScriptedApi, RunningRouter]]:
    api = ScriptedApi()
    await api.start()
    connection = await find_service("workers", None, api.kubeconfig(tmp_path / "kubeconfig"))
    if not up:
        await api.stop()
    try:
        async with start_router(source=KubernetesDiscovery(connection, policy=policy), **settings) as router:
            yield api, router
    finally:
        await api.stop()


async def test_pods_come_are_not_ready_terminate_and_go(start_router: StartRouter, tmp_path: Path) -> None:
    async with (
        fake_workers(good, good) as (one, two),
        in_cluster(start_router, tmp_path, retry_deadline=20) as (api, router),
    ):
        waiting = asyncio.create_task(router.complete())
        await api.put(slice_of(one, "w-1", ready=False))
        await until(lambda: len(router.router.fleet.workers(0.0)) == 1)
        assert router.candidates() == 0
        await api.put(slice_of(one, "w-1", ready=True))
        assert (await waiting).headers["x-kvcluster-worker"] == one.url
        await api.put(slice_of(two, "w-2"))
        await router.ready(2)
        await api.put(slice_of(one, "w-1", ready=False, serving=True, terminating=True))
        await router.ready(1)
        assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        await api.delete(f"s-{one.port}")
        await until(lambda: len(router.router.fleet.workers(0.0)) == 1)


async def test_a_pod_restarted_in_place_is_noticed_though_no_slice_changes(
    start_router: StartRouter, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good) as (worker,), in_cluster(start_router, tmp_path) as (api, router):
        worker.serve_feed(tokenizer.fingerprint, "w-1")
        worker.blocks = CHAIN[:5]
        await api.put(slice_of(worker, "w-1"))

        def held() -> int:
            return sum(router.router.fleet.held_blocks(worker.url).values())

        await until(lambda: len(router.router.fleet.workers(0.0)) == 1 and held() == 5)
        await worker.stop(reset=True)
        await router.ready(0)
        worker.epoch, worker.blocks = 2, CHAIN[:1]
        await worker.start()
        await until(lambda: held() == 1)
        await router.ready(1)
        assert router.router.fleet.workers(0.0)[0].epoch == 2
        assert len(api.questions) == 2


async def test_a_pod_replaced_at_the_same_address_starts_from_nothing(
    start_router: StartRouter, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good) as (worker,), in_cluster(start_router, tmp_path) as (api, router):
        worker.serve_feed(tokenizer.fingerprint, "w-1")
        worker.blocks = CHAIN[:5]
        await api.put(slice_of(worker, "w-1"))
        await until(lambda: len(worker.feeds) == 1)
        worker.drop_feeds()
        worker.name, worker.blocks = "w-2", []
        await api.put(slice_of(worker, "w-2"))
        await until(lambda: [status.worker_id for status in router.router.fleet.workers(0.0)] == ["w-2"])
        assert router.router.fleet.held_blocks(worker.url) == {}


async def test_before_the_first_list_the_router_is_not_ready_and_says_why(
    start_router: StartRouter, tmp_path: Path
) -> None:
    async with fake_workers(good) as (worker,), in_cluster(start_router, tmp_path, up=False) as (api, router):
        await until(lambda: router.metric("discovery_failures_total", cause="connect") > 0)
        response = await router.management.get("/ready")
        assert response.status_code == 503
        assert response.json()["reason"].startswith("the workers are not known yet: the API server cannot be reached")
        assert response.json()["discovery"]["healthy"] is False
        assert (await router.management.get("/health")).status_code == 200
        api.refusals = [(403, status(403, "Forbidden", "no RBAC policy matched"), "")] * 1000
        await api.start()
        await until(lambda: router.metric("discovery_failures_total", cause="forbidden") > 0)
        assert "grant list and watch" in (await router.management.get("/ready")).json()["reason"]
        api.refusals.clear()
        await until(lambda: router.router.management.discovery().known)
        response = await router.management.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "no worker is known")
        await api.put(slice_of(worker, "w-1"))
        await router.ready(1)
        assert (await router.management.get("/ready")).status_code == 200


async def test_an_api_server_that_is_away_is_said_and_the_fleet_serves_on(
    start_router: StartRouter, tmp_path: Path
) -> None:
    policy = ListWatchPolicy(retry=Backoff(0.002, 0.02), settled=0.02, stale_after=0.1)
    async with (
        fake_workers(good, good) as (one, two),
        in_cluster(start_router, tmp_path, policy=policy) as (api, router),
    ):
        for number, worker in enumerate((one, two)):
            await api.put(slice_of(worker, f"w-{number}"))
        await router.ready(2)
        await api.stop(reset=True)
        await until(lambda: router.metric("discovery_age_seconds") > 0.1)
        response = await router.management.get("/ready")
        assert response.status_code == 200
        said = response.json()["discovery"]
        assert (said["healthy"], said["age_seconds"] > 0.1) == (False, True)
        assert "cannot be reached" in said["error"]
        assert (await router.management.get("/status")).json()["discovery"]["healthy"] is False
        await two.stop(reset=True)  # the list cannot say so: the router sees for itself
        for _ in range(3):
            assert (await router.complete()).headers["x-kvcluster-worker"] == one.url
        api.feeds.clear()
        await api.delete(f"s-{two.port}")
        await api.start()
        await until(lambda: len(router.router.fleet.workers(0.0)) == 1)
        await until(lambda: router.router.management.discovery().error == "")
        assert router.metric("discovery_relists_total", reason="failures") >= 1
