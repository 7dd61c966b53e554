"""From `kubectl apply` to answered requests, and everything that changes under them: no request fails.

Not covered: several nodes, NetworkPolicies and cluster DNS, which the fake node does not play; autoscalers, whose
controllers do not run here.
"""

from __future__ import annotations

import asyncio
import base64

import httpx
import pytest

from controller.status.compute import HELD_PERMILLE
from router.core.worker_state import WorkerPhase
from router.live.document import RouterPhase
from tests.kube.backends import used
from tests.kube.e2e.support import SPEED, World, failures
from tests.kube.operator.support import OBJECTS
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


async def test_requests_flow_while_everything_changes(world: World):
    await world.serve(workers=2, routers=2)

    async def restart(component: str) -> None:
        await world.restart(component)
        await world.rolled_out(component)

    async def other_strategy() -> None:
        await world.api.patch("kvclusters", "rag", {"spec": {"router": {"strategy": "least_loaded"}}})
        await world.api.settled("rag")
        await world.rolled_out("router")

    records = await world.under_load(
        lambda: world.scale(3),
        lambda: restart("worker"),
        lambda: restart("router"),
        lambda: world.scale(1),
        other_strategy,
    )
    assert failures(records) == []
    assert len(records) > 100
    pods = {pod["metadata"]["name"] for pod in await world.pods("router")}
    shown = await asyncio.gather(*(world.live(pod) for pod in pods))
    for document in shown:
        assert {router.name for router in document.routers} == pods, "each router's page shows all of them"
        assert {router.state for router in document.routers} == {RouterPhase.SERVING}
        assert {worker.state for worker in document.workers} == {WorkerPhase.SERVING}
    assert len({document.totals.requests for document in shown}) == 1, "and counts the requests of all"
    await world.api.delete("kvclusters", "rag")

    async def gone() -> bool:
        return await world.api.lacks(OBJECTS) and not await world.api.list("pods")

    await eventually(gone, "everything is gone", 60)


RANKED = {"speed": SPEED, "dataParallel": {"size": 2}}


async def test_the_status_tells_what_goes_on(world: World):
    """Of workers with two ranks each, which it counts as pods."""
    await world.serve(workers=2, engine=RANKED)
    records = await world.under_load()
    assert failures(records) == []
    told = [record for record in records if record.cached_tokens is not None]
    rate = sum(record.cached_tokens or 0 for record in told) / sum(record.prompt_tokens or 0 for record in told)

    async def shown() -> bool:
        status = (await world.api.get("kvclusters", "rag"))["status"]
        return bool(
            status["workers"]["summary"] == "2/2"
            and status["routers"]["summary"] == "1/1"
            and abs(float(status.get("hitRate", "-1%").rstrip("%")) - 100 * rate) < HELD_PERMILLE / 10
            and await world.api.condition("rag", "CacheViewFresh", "Fresh")
        )

    names = {pod["metadata"]["name"] for pod in await world.pods("worker")}
    assert {record.worker for record in told} == {f"{name}/{rank}" for name in names for rank in range(2)}
    await eventually(shown, "the answers' hit rate and numbers are in the status", 30)
    events = [
        (event["reason"], event["message"])
        for event in await world.api.events()
        if event["involvedObject"]["kind"] == "KVCluster"
    ]
    assert "Serving" in {reason for reason, _ in events}
    assert len(events) == len(set(events)), "no event is repeated"
    await rotated(world)


async def rotated(world: World) -> None:
    """The routers' management port asks for the token of its Secret, and follows it."""
    [pod] = await world.pods("router")
    before = await world.management_headers()
    async with httpx.AsyncClient(base_url=f"http://{pod['status']['podIP']}:9000", trust_env=False) as client:
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/status")).status_code == 401
        assert (await client.get("/status", headers=before)).status_code == 200
        new = {"token": base64.b64encode(b"a-token-of-tomorrow").decode()}
        await world.api.patch("secrets", "rag-router-management", {"data": new})
        after = await world.management_headers()
        assert after != before

        async def followed() -> bool:
            return [(await client.get("/status", headers=each)).status_code for each in (before, after)] == [401, 200]

        await eventually(followed, "the router asks for the new token", 30)


async def test_a_router_that_waits_for_its_first_worker_is_not_recorded_as_failing(world: World):
    await world.api.create("rag", workers={"replicas": 0}, engine={"speed": 4})

    async def routers_run() -> bool:
        return any(pod.get("status", {}).get("phase") == "Running" for pod in await world.pods("router"))

    await eventually(routers_run, "a router runs", 60)
    await eventually(lambda: world.api.condition("rag", "RouterAvailable", "WaitingForWorkers"), "it waits", 30)
    await world.api.scale("kvclusters", "rag", 1)
    await world.ready()
    said = [f"{event['involvedObject']['name']}: {event.get('message')}" for event in await world.api.list("events")]
    assert [each for each in said if "Readiness" in each] == []


async def test_a_router_sends_requests_where_their_prefix_is(world: World):
    await world.serve(workers=3)
    body = {"prompt": "A long document about routing and caches. " * 40, "max_tokens": 4}
    async with httpx.AsyncClient(base_url=world.url(), timeout=30, trust_env=False) as client:
        first = await client.post("/v1/completions", json=body)
        for _ in range(3):
            again = await client.post("/v1/completions", json=body)
            assert again.headers["x-kvcluster-worker"] == first.headers["x-kvcluster-worker"]
            assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    names = {pod["metadata"]["name"] for pod in await world.pods("worker")}
    assert first.headers["x-kvcluster-worker"] in names, "workers are called after their pods"


async def test_the_coldest_worker_leaves_first(world: World):
    await world.serve(workers=3, engine=RANKED)
    body = {"prompt": "What everybody asks about. " * 60, "max_tokens": 2}
    async with httpx.AsyncClient(base_url=world.url(), timeout=30, trust_env=False) as client:
        for _ in range(6):
            answer = await client.post("/v1/completions", json=body)
    warm, _, _ = answer.headers["x-kvcluster-worker"].partition("/")

    async def priced() -> bool:
        costs = {
            pod["metadata"]["name"]: int(
                pod["metadata"].get("annotations", {}).get("controller.kubernetes.io/pod-deletion-cost", 0)
            )
            for pod in await world.pods("worker")
        }
        return costs[warm] == max(costs.values()) > 0

    await eventually(priced, "the warm worker is the dearest", 30)
    await world.scale(1)
    (left,) = await world.pods("worker")
    assert left["metadata"]["name"] == warm
    assert ("patch", "", "pods") in used(world.api.server.requests, world.api.operator)


async def test_an_image_that_cannot_be_pulled_is_said_with_the_pods_name(world: World):
    world.node.refuse_image("registry.example/none:1")
    await world.serve(workers=1)
    await world.api.patch("kvclusters", "rag", {"spec": {"engine": {"image": "registry.example/none:1"}}})

    async def said() -> bool:
        return await world.api.condition("rag", "Degraded", "ImagePullFailed")

    await eventually(said, "the status says so", 60)
    message = next(each["message"] for each in await world.api.conditions("rag") if each["type"] == "Degraded")
    assert "registry.example/none:1" in message
    assert any(pod["metadata"]["name"] in message for pod in await world.pods("worker"))
    assert await world.api.condition("rag", "Ready", "Serving"), "the old worker goes on"


async def test_a_worker_that_crashes_is_said_with_the_pods_name(world: World):
    await world.api.create("rag", engine={"args": ["--no-such-flag"]})

    async def said() -> bool:
        # One look at both: a restarted container runs for a moment.
        conditions, pods = await world.api.conditions("rag"), await world.pods("worker")
        told = [each["message"] for each in conditions if each["reason"] == "CrashLooping"]
        return any(pod["metadata"]["name"] in message for pod in pods for message in told)

    await eventually(said, "the status says so", 60)
    await world.api.patch("kvclusters", "rag", {"spec": {"engine": {"args": []}}})
    await world.ready()
    await eventually(lambda: world.api.condition("rag", "Degraded", "AsExpected"), "it recovers", 60)


async def test_a_quota_that_refuses_pods_is_said(world: World):
    await world.serve(workers=1)
    world.node.quota("serving", pods=2)
    await world.api.scale("kvclusters", "rag", 3)

    async def said() -> bool:
        return await world.api.condition("rag", "Degraded", "QuotaExceeded")

    await eventually(said, "the status says so", 60)
    assert await world.api.condition("rag", "Ready", "Serving")
