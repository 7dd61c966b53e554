"""Flow control in a running router: requests that wait, go on, are turned away or leave, and what is counted of them.

Not covered: the order in which they go on (tests/router/core/test_flow.py), what workloads gain
(tests/bench/test_simulated_flow.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import Connection, Received, fake_workers, good

LONG = "word " * 4000
"""A prompt whose prefill takes longer than a worker may have to do if it is to get more."""


@dataclass
class Gated:
    """A worker that answers when it is let."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    order: list[str] = field(default_factory=list)

    async def __call__(self, connection: Connection, request: Received) -> None:
        self.order.append(request.header("x-request-id") or "")
        await self.gate.wait()
        await good(connection, request)


@asynccontextmanager
async def busy(start_router: StartRouter, **settings: object) -> AsyncIterator[tuple[RunningRouter, Gated, MovedClock]]:
    """A router whose only worker is busy with one request for as long as the gate is closed. Its time stands still, so
    that nothing but an answer makes room."""
    worker, clock = Gated(), MovedClock()
    async with fake_workers(worker) as workers:
        options = {"flow_control": True, "liveness_timeout": 1e6, **settings}
        async with start_router(workers, clock=clock, **options) as router, asyncio.TaskGroup() as group:
            group.create_task(ask(router, "first"))
            await until(lambda: worker.order == ["first"])
            try:
                yield router, worker, clock
            finally:
                worker.gate.set()


async def ask(router: RunningRouter, name: str, **headers: str) -> httpx.Response:
    content = {"prompt": LONG, "max_tokens": 2, "stream": True}
    headers = {"x-request-id": name, **{key.replace("_", "-"): value for key, value in headers.items()}}
    return await router.client.post("/v1/completions", json=content, headers=headers)


def waiting(router: RunningRouter) -> int:
    return int(router.metric("flow_waiting"))


async def test_requests_wait_for_a_busy_worker_and_go_on_by_priority(start_router: StartRouter) -> None:
    async with busy(start_router, objectives="urgent=5") as (router, worker, _):
        tasks = []
        for number, (name, headers) in enumerate(
            [("batch", {"x_priority": "-1"}), ("plain", {}), ("urgent", {"x_llm_d_inference_objective": "urgent"})]
        ):
            tasks.append(asyncio.create_task(ask(router, name, **headers)))
            await until(lambda sent=number + 1: waiting(router) == sent)
        assert router.metric("flow_waiting_bytes", **{"class": "high"}) > len(LONG)
        assert worker.order == ["first"]

        worker.gate.set()

        assert [(await task).status_code for task in tasks] == [200, 200, 200]
        assert worker.order == ["first", "urgent", "plain", "batch"]
        assert router.metric("flow_wait_seconds_count") == 3
        assert waiting(router) == router.metric("flow_waiting_bytes") == 0


async def test_without_flow_control_they_wait_in_the_worker(start_router: StartRouter) -> None:
    async with busy(start_router, flow_control=False) as (router, worker, _):
        task = asyncio.create_task(ask(router, "second"))
        await until(lambda: worker.order == ["first", "second"])
        worker.gate.set()
        assert (await task).status_code == 200


async def test_a_worker_that_has_room_gets_requests_at_once(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, flow_control=True) as router:
        for number in range(3):
            assert (await ask(router, str(number))).status_code == 200
        assert router.metric("flow_wait_seconds_count") == 0


async def test_a_client_that_leaves_leaves_the_queue(start_router: StartRouter) -> None:
    async with busy(start_router) as (router, worker, _):
        leaving = asyncio.create_task(ask(router, "leaving"))
        staying = asyncio.create_task(ask(router, "staying"))
        await until(lambda: waiting(router) == 2)
        leaving.cancel()
        await until(lambda: waiting(router) == 1)
        worker.gate.set()

        assert (await staying).status_code == 200
        assert worker.order == ["first", "staying"]
        assert router.metric("flow_left_total", **{"class": "standard"}) == 1


@pytest.mark.parametrize(
    ("path", "kind"),
    [pytest.param("/v1/completions", None, id="OpenAI"), pytest.param("/v1/messages", "error", id="Messages")],
)
async def test_what_finds_no_room_to_wait_is_turned_away(
    start_router: StartRouter, path: str, kind: str | None
) -> None:
    async with busy(start_router, flow_max_bytes=10_000) as (router, worker, _):
        body = {"model": "m", "prompt": LONG, "messages": [{"role": "user", "content": LONG}], "max_tokens": 2}
        answer = await router.client.post(path, json=body)

        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert answer.json().get("type") == kind
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert router.metric("flow_shed_total", reason="rejected-saturated", **{"class": "standard"}) == 1
        assert worker.order == ["first"]


async def test_what_has_waited_for_too_long_is_turned_away(start_router: StartRouter) -> None:
    async with busy(start_router, flow_classes="only=0:0.05") as (router, _, clock):
        task = asyncio.create_task(ask(router, "late"))
        await until(lambda: waiting(router) == 1)
        clock.now += 3.0
        answer = await task

        assert answer.status_code == 429
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-ttl-expired"
        assert answer.headers["retry-after"] == "3"
        assert "3 s" in answer.json()["error"]["message"]


async def test_what_waits_when_the_router_ends_is_turned_away(start_router: StartRouter) -> None:
    async with busy(start_router) as (router, worker, _):
        task = asyncio.create_task(ask(router, "waiting"))
        await until(lambda: waiting(router) == 1)
        assert router.router.admission is not None
        router.router.admission.close()
        answer = await task

        assert answer.status_code == 503
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-shutting-down"
        worker.gate.set()


async def test_the_time_makes_room_where_answers_do_not_show_it(start_router: StartRouter) -> None:
    """A prefill counts as over when its time has come, so the next request goes on before an answer is seen."""
    async with busy(start_router) as (router, worker, clock):
        task = asyncio.create_task(ask(router, "second"))
        await until(lambda: waiting(router) == 1)
        [status] = router.router.fleet.workers(clock())
        clock.now += status.queue_seconds
        await until(lambda: worker.order == ["first", "second"])
        worker.gate.set()
        assert (await task).status_code == 200
