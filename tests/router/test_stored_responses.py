"""Stored responses: a request about one reaches the worker that stores it, through any router, also after a restart.

Covered: ids that name their worker, what a client gets when that worker cannot answer or is gone, ids that name none,
and 20 second turns through two routers in front of two emulated workers. Not covered: what a worker stores
(tests/worker/test_responses.py), `holders` by itself (core/test_stored_responses.py).
"""

from __future__ import annotations

import asyncio
import itertools
import re
from contextlib import AsyncExitStack

import httpx
import orjson
import pytest

from router.core.stored_responses import holder_tag
from router.server.affinity import with_request_id
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import Connection, Received, answering, fake_workers
from tests.router.test_real_workers import RealWorker

RESPONSES = "/v1/responses"


async def respond(connection: Connection, request: Received) -> None:
    """A worker that stores responses, as far as a router can see."""
    if request.method == "POST" and request.target == RESPONSES:
        body = orjson.loads(request.body)
        await connection.answer(200, orjson.dumps({"id": body.get("request_id", "none"), "object": "response"}))
    else:
        await connection.answer(200, orjson.dumps({"asked": request.target}))


async def create(router: RunningRouter, **fields: object) -> httpx.Response:
    return await router.client.post(RESPONSES, json={"input": "hi", **fields})


async def test_the_id_of_a_response_leads_back_to_its_worker(start_router: StartRouter) -> None:
    async with fake_workers(respond, respond, respond) as workers, start_router(workers) as router:
        for number in range(6):
            made = await create(router)
            name = made.json()["id"]
            assert re.fullmatch("resp_[0-9a-f]{32}_[0-9a-f]{12}", name)
            assert name.endswith(holder_tag(workers[number % 3].url))  # in turn: no other rule decides
            for method, path in (("GET", ""), ("GET", "?stream=true&starting_after=3"), ("GET", "/input_items"),
                                 ("DELETE", ""), ("POST", "/cancel")):  # fmt: skip
                answer = await router.client.request(method, f"{RESPONSES}/{name}{path}")
                assert answer.json() == {"asked": f"{RESPONSES}/{name}{path}"}
                assert answer.headers["x-kvcluster-reason"] == "stored_response"
                assert answer.headers["x-kvcluster-worker"] == made.headers["x-kvcluster-worker"]
            turn = await create(router, previous_response_id=name)
            assert turn.headers["x-kvcluster-worker"] == made.headers["x-kvcluster-worker"]
            assert turn.json()["id"] != name
        assert router.metric("decisions_total", reason="stored_response") == 6


async def test_a_retry_names_the_worker_that_it_goes_to(start_router: StartRouter) -> None:
    async with fake_workers(answering(500), respond) as workers, start_router(workers) as router:
        made = await create(router)
        assert made.headers["x-kvcluster-attempts"] == "2"
        assert made.json()["id"].endswith(holder_tag(workers[1].url))


@pytest.mark.parametrize(
    "fields",
    [pytest.param({"store": False}, id="not stored"), pytest.param({"request_id": "resp_mine"}, id="the client's own")],
)
async def test_other_bodies_pass_unchanged(start_router: StartRouter, fields: dict[str, object]) -> None:
    body = orjson.dumps({"input": "hi", **fields})
    async with fake_workers(respond) as workers, start_router(workers) as router:
        await router.client.post(RESPONSES, content=body, headers={"content-type": "application/json"})
        assert workers[0].received[0].body == body


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        pytest.param(b'{"a":1}', b'{"request_id":"x","a":1}', id="object"),
        pytest.param(b' \n{ "a" : 1 } ', b' \n{"request_id":"x", "a" : 1 } ', id="spaces"),
        pytest.param(b"{ }", b'{"request_id":"x" }', id="empty object"),
        pytest.param(b"[{}]", b"[{}]", id="no object"),
        pytest.param(b"", b"", id="nothing"),
        pytest.param('{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-16"), id="another encoding"),
        pytest.param('{"a":1}'.encode("utf-16-le"), '{"a":1}'.encode("utf-16-le"), id="without its mark"),
    ],
)
def test_an_id_is_added_without_reading_the_body(body: bytes, sent: bytes) -> None:
    assert with_request_id(body, "x") == sent


async def test_a_response_of_a_worker_that_has_left_is_not_found(start_router: StartRouter) -> None:
    clock = MovedClock()
    async with fake_workers(respond, respond) as workers, start_router(workers, clock=clock) as router:
        clock.now += 60
        gone = f"resp_{'0' * 32}_{holder_tag('http://10.9.9.9:8000')}"
        for answer in (
            await router.client.get(f"{RESPONSES}/{gone}"),
            await create(router, previous_response_id=gone),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["param"]) == (404, "invalid_request_error", "response_id")
            assert error["message"].startswith(
                f"Response with id '{gone}' not found. The worker that stored it has left"
            )
        assert not any(worker.received for worker in workers)


@pytest.mark.parametrize(
    "name", ["resp_0123456789abcdef0123456789abcdef", "resp_x_y", "..%3B", "%22", pytest.param("r" * 900, id="long")]
)
async def test_an_id_that_names_no_worker_gets_the_engines_404(start_router: StartRouter, name: str) -> None:
    async with fake_workers(respond, respond) as workers, start_router(workers) as router:
        answer = await router.client.get(f"{RESPONSES}/{name}")
        assert answer.status_code == 404
        if name.startswith("resp"):
            message = f"Response with id '{name}' not found."
            wanted = {"message": message, "type": "invalid_request_error", "param": "response_id", "code": 404}
            assert answer.json() == {"error": wanted}
        assert not any(worker.received for worker in workers)


async def test_an_endpoint_below_the_responses_is_no_response(start_router: StartRouter) -> None:
    async with fake_workers(respond, respond) as workers, start_router(workers) as router:
        answer = await router.client.post(f"{RESPONSES}/render", json={"input": "hi"})
        assert answer.json() == {"asked": f"{RESPONSES}/render"}


async def test_the_only_worker_is_asked_for_any_id(start_router: StartRouter) -> None:
    async with fake_workers(respond) as workers, start_router(workers) as router:
        answer = await router.client.get(f"{RESPONSES}/resp_mine")
        assert answer.json() == {"asked": f"{RESPONSES}/resp_mine"}


@pytest.mark.parametrize("status", [400, 404, 405])
async def test_a_refusal_of_the_worker_that_stores_it_is_final(start_router: StartRouter, status: int) -> None:
    async with fake_workers(answering(status), respond) as workers, start_router(workers) as router:
        name = f"resp_{'0' * 32}_{holder_tag(workers[0].url)}"
        answer = await router.client.get(f"{RESPONSES}/{name}")
        assert (answer.status_code, answer.headers["x-kvcluster-attempts"]) == (status, "1")
        assert not workers[1].received


async def test_a_worker_that_is_away_for_a_moment_is_waited_for(start_router: StartRouter) -> None:
    async with fake_workers(respond, respond) as workers, start_router(workers) as router:
        name = (await create(router)).json()["id"]
        await workers[0].stop()
        answer = await router.client.get(f"{RESPONSES}/{name}")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert "No worker answered" in answer.json()["error"]["message"]
        again = await router.client.get(f"{RESPONSES}/{name}")
        assert f"The worker that stores response '{name}' cannot answer now" in again.json()["error"]["message"]
        assert not workers[1].received
    async with fake_workers(respond, respond) as workers, start_router(workers, retry_deadline=20) as router:
        name = (await create(router)).json()["id"]
        await workers[0].stop()
        waiting = asyncio.create_task(router.client.get(f"{RESPONSES}/{name}"))
        await until(lambda: router.candidates() == 1)
        await workers[0].start()
        assert (await waiting).json() == {"asked": f"{RESPONSES}/{name}"}


async def test_a_worker_that_drains_is_asked_still(start_router: StartRouter) -> None:
    async with fake_workers(respond, respond) as workers, start_router(workers) as router:
        name = (await create(router)).json()["id"]
        workers[0].draining = True
        router.router.fleet_sync.busy(workers[0].url)
        await until(lambda: "draining" in {one.state for one in router.router.fleet.workers(router.router.clock())})
        assert (await router.client.get(f"{RESPONSES}/{name}")).json() == {"asked": f"{RESPONSES}/{name}"}


@pytest.mark.process
async def test_every_second_turn_succeeds_through_two_routers_and_a_restart(start_router: StartRouter) -> None:
    """20 of 20, where routers that choose by load would find half of them."""
    async with AsyncExitStack() as stack:
        workers = [RealWorker(1000.0, "--enable-responses-store") for _ in range(2)]
        for worker in workers:
            stack.push_async_callback(worker.kill)
            await worker.start()
        first = [await stack.enter_async_context(start_router(workers)) for _ in range(2)]
        names = [
            (await create(router, input=f"Turn one of {number}", max_output_tokens=3)).json()["id"]
            for number, router in zip(range(20), itertools.cycle(first), strict=False)
        ]
        assert len({name[-12:] for name in names}) == 2
        async with start_router(workers) as restarted:
            found = []
            for number, (name, router) in enumerate(zip(names, itertools.cycle([*first, restarted]), strict=False)):
                turn = await create(router, input="and two", previous_response_id=name, max_output_tokens=3)
                looked_up = await restarted.client.get(f"{RESPONSES}/{turn.json().get('id')}")
                found.append((turn.status_code, looked_up.status_code))
                assert turn.json()["previous_response_id"] == name, number
        assert found == [(200, 200)] * 20
