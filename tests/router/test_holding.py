"""Requests that are held while no worker is ready (`--hold-seconds`): answered when one is, bounded, never lost.

Not covered: what starts a worker (tests/controller/objects), the order in which requests go on
(tests/router/core/test_flow.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import FakeWorker, fake_workers, good


@asynccontextmanager
async def without_worker(
    start_router: StartRouter, **settings: object
) -> AsyncIterator[tuple[RunningRouter, FakeWorker, MovedClock]]:
    """A router whose only worker still loads its model."""
    clock = MovedClock()
    async with fake_workers(good) as [worker]:
        worker.health = 503
        options = {"hold_seconds": 100.0, "liveness_timeout": 1e6, **settings}
        async with start_router([worker], ready=0, clock=clock, **options) as router:
            yield router, worker, clock


async def held(router: RunningRouter, count: int) -> list[asyncio.Task[httpx.Response]]:
    """So many requests that are held by the router."""
    tasks = [asyncio.create_task(router.complete(f"prompt {number}")) for number in range(count)]
    await until(lambda: router.metric("flow_waiting") == count)
    return tasks


async def test_the_live_document_shows_what_waits_for_how_long_and_what_was_turned_away(
    start_router: StartRouter,
) -> None:
    limits = {"flow_classes": "high=1,standard=0", "flow_max_requests": 3}
    async with without_worker(start_router, **limits) as (router, worker, clock):
        tasks = await held(router, 3)
        clock.now += 4.24
        assert (await router.complete("a fourth")).status_code == 503
        shown = (await router.management.get("/live")).json()["queues"]
        worker.health = 200
        await asyncio.gather(*tasks)
        idle = (await router.management.get("/live")).json()["queues"]
    high, standard = shown
    assert (high["name"], high["priority"], high["waiting"], high["oldest_seconds"]) == ("high", 1, 0, None)
    assert standard == {
        "name": "standard", "priority": 0, "waiting": 3, "held": 3, "oldest_seconds": 4.2, "shed": 1,
    }  # fmt: skip
    assert [(each["waiting"], each["oldest_seconds"]) for each in idle] == [(0, None), (0, None)]


@pytest.mark.parametrize("flow_control", [False, True], ids=["held alone", "with flow control"])
async def test_every_held_request_is_answered_once_a_worker_is_ready(
    start_router: StartRouter, flow_control: bool
) -> None:
    async with without_worker(start_router, flow_control=flow_control) as (router, worker, _):
        tasks = await held(router, 20)
        ready = await router.management.get("/ready")
        assert ready.status_code == 200, "a Service without ready endpoints could not hold the next one"
        assert ready.json()["workers_ready"] == 0
        assert worker.received == []

        worker.health = 200

        assert [(await task).status_code for task in tasks] == [200] * 20
        assert len([each for each in worker.received if each.method == "POST"]) == 20
        assert router.metric("flow_waiting") == router.metric("flow_waiting_bytes") == 0
        assert router.metric("flow_wait_seconds_count") == 20


async def test_without_it_the_router_is_not_ready_and_gives_up_at_the_retry_deadline(start_router: StartRouter) -> None:
    async with without_worker(start_router, hold_seconds=0.0) as (router, _, clock):
        task = asyncio.create_task(router.complete())
        await until(lambda: router.data.in_flight == 1)
        assert (await router.management.get("/ready")).status_code == 503
        clock.now += 1.0
        assert (await task).status_code == 503


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"flow_max_requests": 2}, "rejected-saturated", id="in number"),
        pytest.param({"flow_max_bytes": 2 * 1100}, "rejected-saturated", id="in bytes"),
    ],
)
async def test_what_is_held_is_bounded(start_router: StartRouter, settings: dict[str, object], reason: str) -> None:
    async with without_worker(start_router, **settings) as (router, worker, _):
        tasks = await held(router, 2)
        turned_away = await router.complete("one too many")

        assert turned_away.status_code == 503
        assert turned_away.headers["x-llm-d-request-dropped-reason"] == reason
        assert int(turned_away.headers["retry-after"]) >= 1
        assert "No worker is ready" in turned_away.json()["error"]["message"]
        worker.health = 200
        assert [(await task).status_code for task in tasks] == [200, 200]


async def test_what_is_held_is_bounded_in_time(start_router: StartRouter) -> None:
    async with without_worker(start_router, hold_seconds=0.05) as (router, _, clock):
        [task] = await held(router, 1)
        clock.now += 100.0
        answer = await task

        assert answer.status_code == 503
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-ttl-expired"
        assert answer.headers["retry-after"] == "30"
        assert "No worker became ready within 100 s" in answer.json()["error"]["message"]


async def test_a_client_that_leaves_is_no_longer_held(start_router: StartRouter) -> None:
    async with without_worker(start_router) as (router, worker, _):
        leaving, staying = await held(router, 2)
        leaving.cancel()
        await until(lambda: router.metric("flow_waiting") == 1)
        worker.health = 200
        assert (await staying).status_code == 200
        assert len([each for each in worker.received if each.method == "POST"]) == 1


async def test_a_request_whose_only_worker_fails_is_held_for_the_next(start_router: StartRouter) -> None:
    async with without_worker(start_router) as (router, worker, _):
        worker.health = 200
        await router.ready(1)
        await worker.stop(reset=True)
        task = asyncio.create_task(router.complete())
        await until(lambda: router.metric("flow_waiting") == 1)
        await worker.start()
        assert (await task).status_code == 200


async def test_what_is_held_when_the_router_ends_is_handed_back_before_it_does(start_router: StartRouter) -> None:
    async with without_worker(start_router) as (router, _, _clock):
        tasks = await held(router, 3)
        router.router.hand_back_before(2.0)
        answers = [await task for task in tasks]
        late = await router.complete()

        for answer in (*answers, late):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-shutting-down"
