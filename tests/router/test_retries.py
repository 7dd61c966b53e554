"""Requests that do harm, and workers that fail fast: what must not be sent again, and who must not get more requests.

Covered: requests that kill engines, requests that are not safe to repeat, the retry budget, doubted refusals,
Retry-After, ejections. Not covered: the kinds of failure one by one (test_failures.py), the pure rules
(tests/router/core), counts (test_figures.py).
"""

from __future__ import annotations

import asyncio

import pytest

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import (
    DONE,
    ERROR_EVENT,
    Connection,
    FakeWorker,
    Received,
    Script,
    answering,
    fake_workers,
    good,
    good_after,
    resets,
    streaming,
    token,
)

DEAD = b'{"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}'
"""vLLM's answer to every request that its engine had when it died (captured from 0.32)."""


def counts(workers: list[FakeWorker]) -> list[int]:
    return [len(worker.received) for worker in workers]


# --- poison ---


async def dead_engine(connection: Connection, request: Received) -> None:
    await connection.answer(500, DEAD)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "dying",
    [
        pytest.param(resets, id="reset"),
        pytest.param(dead_engine, id="status 500"),
        pytest.param(streaming(ERROR_EVENT + DONE), id="within the stream"),
    ],
)
async def test_a_request_that_kills_its_engine_kills_two_at_most(
    start_router: StartRouter, dying: Script, stream: bool
) -> None:
    async def poisoned(connection: Connection, request: Received) -> None:
        await (dying if b"poison" in request.body else good)(connection, request)

    async with fake_workers(*[poisoned] * 4) as workers, start_router(workers) as router:
        response = await router.complete("poison", stream=stream)
        assert b"error" in response.content
        assert response.headers["x-kvcluster-attempts"] == "2"
        assert sum(counts(workers)) == 2
        assert router.metric("retries_denied_total", why="suspect") == 1
        assert (await router.complete()).status_code == 200


async def test_a_worker_that_dies_altogether_takes_a_poison_request_to_one_more_only(start_router: StartRouter) -> None:
    """The process is gone: connections are reset, and its address refuses new ones before the reset is seen."""
    dying: list[asyncio.Task[None]] = []

    async with fake_workers(*[good] * 4) as workers:

        async def dies(connection: Connection, request: Received) -> None:
            if b"poison" not in request.body:
                await good(connection, request)
                return
            killed = next(worker for worker in workers if request in worker.received)
            dying.append(asyncio.create_task(killed.stop(reset=True)))
            await connection.closed()

        for worker in workers:
            worker.script = dies
        async with start_router(workers) as router:
            assert (await router.complete("poison")).status_code == 503
            assert len(dying) == 2
            assert (await router.complete()).status_code == 200


# --- what must not be done twice ---


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param(resets, id="reset"),
        pytest.param(answering(500), id="500"),
        pytest.param(answering(503), id="503"),
        pytest.param(answering(429), id="429"),
        pytest.param(answering(404), id="404"),
    ],
)
async def test_what_is_not_safe_to_repeat_is_sent_once(start_router: StartRouter, failing: Script) -> None:
    path = "/v1/load_lora_adapter"
    async with fake_workers(failing, good) as workers, start_router(workers, allowed_paths=[path]) as router:
        response = await router.client.post(path, json={"lora_name": "x"})
        assert response.status_code >= 400
        assert counts(workers) == [1, 0]
        assert router.metric("retries_denied_total", why="unsafe") == 1


async def test_what_is_not_safe_to_repeat_goes_elsewhere_when_it_was_never_sent(start_router: StartRouter) -> None:
    path = "/v1/load_lora_adapter"
    async with fake_workers(good, good) as workers, start_router(workers, allowed_paths=[path]) as router:
        await workers[0].stop()
        response = await router.client.post(path, json={"lora_name": "x"})
        assert response.status_code == 200
        assert len(workers[1].received) == 1


# --- the budget ---


async def test_when_everybody_fails_the_load_is_not_multiplied(start_router: StartRouter) -> None:
    budget = {"retry_floor": 0.0, "retry_share": 0.2, "eject_after": 0, "retry_deadline": 0.0}
    settings = {**budget, "clock": MovedClock()}
    async with fake_workers(*[answering(500)] * 4) as workers, start_router(workers, **settings) as router:
        for _ in range(50):
            assert (await router.complete()).status_code == 500
        assert sum(counts(workers)) == 50 + 10
        assert router.metric("retries_denied_total", why="budget") == 40


# --- silence ---


async def test_a_worker_frozen_for_a_moment_keeps_what_it_computes(start_router: StartRouter) -> None:
    release, clock = asyncio.Event(), MovedClock()
    workers_of = fake_workers(good_after(release), good)
    async with workers_of as workers, start_router(workers, clock=clock, stall_timeout=1000) as router:
        computing = asyncio.create_task(router.complete())
        await until(lambda: len(workers[0].received) == 1)
        workers[0].frozen.set()  # its /health is not answered any more
        await router.silence(clock, alive=workers[1:])
        assert router.candidates() == 1
        assert (await router.complete()).headers["x-kvcluster-worker"] == workers[1].url
        assert not computing.done()
        workers[0].frozen.clear()
        release.set()
        response = await computing
        assert response.headers["x-kvcluster-attempts"] == "1"
        assert response.headers["x-kvcluster-worker"] == workers[0].url
        await router.ready(2)


async def test_an_answer_of_a_worker_that_is_silent_altogether_is_cut_after_the_cut_timeout(
    start_router: StartRouter,
) -> None:
    clock, begins = MovedClock(), streaming(token("Hel"), release=asyncio.Event())
    times = {"cut_timeout": 50, "stall_timeout": 1000, "idle_timeout": 1000}
    async with fake_workers(begins) as (worker,), start_router([worker], clock=clock, **times) as router:
        async with router.streaming() as pieces:
            assert await anext(pieces) == token("Hel")
            worker.frozen.set()
            await router.silence(clock)
            assert b"".join([piece async for piece in pieces]) == ERROR_EVENT + DONE
        assert router.metric("broken_streams_total", cause="stalled") == 1


async def test_a_model_that_thinks_for_long_is_not_cut_while_its_worker_lives(start_router: StartRouter) -> None:
    """Its /health is answered, its stream says nothing: for far longer than any bound on silence altogether."""
    release, clock = asyncio.Event(), MovedClock()
    thinks = streaming(token("Hm"), release=release, rest=[token("!", "length")])
    times = {"stall_timeout": 50, "cut_timeout": 50, "idle_timeout": 1000}
    async with (
        fake_workers(thinks) as workers,
        start_router(workers, clock=clock, **times) as router,
        router.streaming() as pieces,
    ):
        assert await anext(pieces) == token("Hm")
        await router.silence(clock, alive=workers)
        release.set()
        assert b"".join([piece async for piece in pieces]) == token("!", "length")


# --- black holes ---


async def drive(router: RunningRouter, requests: int, clients: int = 8) -> list[int]:
    """Statuses of so many requests, each with another prompt, from clients that ask one after another."""
    statuses: list[int] = []

    async def client(number: int) -> None:
        for at in range(number, requests, clients):
            statuses.append((await router.complete(f"prompt {at} of many")).status_code)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return statuses


async def takes_a_while(connection: Connection, request: Received) -> None:
    await asyncio.sleep(0.02)
    await good(connection, request)


@pytest.mark.parametrize(
    ("strategy", "hole", "believed"),
    [
        # Of all strategies this one is drawn most by a worker that is rid of its requests at once.
        pytest.param("least_loaded", answering(429), 0, id="least_loaded-429"),
        pytest.param("least_loaded", answering(429, extra="retry-after: 1\r\n"), 0, id="least_loaded-429-retry-after"),
        pytest.param("least_loaded", answering(404), 0, id="least_loaded-404"),
        # It speaks of one request's body: the first ones are taken for the client's fault.
        pytest.param("least_loaded", answering(400), 3, id="least_loaded-400"),
        pytest.param("least_loaded", answering(500), 0, id="least_loaded-500"),
        pytest.param("least_loaded", resets, 0, id="least_loaded-reset"),
        pytest.param("cache_aware", answering(500), 0, id="cache_aware-500"),
        pytest.param("cache_aware", resets, 0, id="cache_aware-reset"),
        pytest.param("round_robin", answering(500), 0, id="round_robin-500"),
    ],
)
async def test_an_engine_that_fails_at_once_draws_next_to_nothing(
    start_router: StartRouter, strategy: str, hole: Script, believed: int
) -> None:
    workers_of = fake_workers(hole, takes_a_while, takes_a_while, takes_a_while)
    settings = {"routing_strategy": strategy, "clock": MovedClock()}  # no ejection ends
    async with workers_of as workers, start_router(workers, **settings) as router:
        statuses = await drive(router, 96)
        assert len(statuses) - statuses.count(200) == believed
        # What is believed, five that count in a row, and what each client had sent by then.
        assert len(workers[0].received) <= believed + 5 + 8


async def test_what_all_refuse_reaches_the_client_and_counts_against_nobody(start_router: StartRouter) -> None:
    unknown = answering(404, message="no such model")
    async with fake_workers(*[unknown] * 3) as workers, start_router(workers, clock=MovedClock()) as router:
        for number in range(30):
            response = await router.complete(model="unknown")
            assert (response.status_code, response.json()["error"]["message"]) == (404, "no such model")
            assert response.headers["x-kvcluster-attempts"] == ("2" if number == 0 else "1")
        assert sum(counts(workers)) == 31
        assert router.candidates() == 3
        assert router.metric("worker_states", state="ejected") == 0


async def test_a_worker_that_lacks_a_model_is_not_asked_for_it_and_serves_the_rest(start_router: StartRouter) -> None:
    async def lacks(connection: Connection, request: Received) -> None:
        await (answering(404) if b"adapter" in request.body else good)(connection, request)

    async with fake_workers(lacks, good) as workers, start_router(workers) as router:
        for _ in range(20):
            assert (await router.complete(model="adapter")).status_code == 200
            assert (await router.complete(model="base")).status_code == 200
            assert (await router.complete(model="base")).status_code == 200
        assert router.candidates() == 2


async def test_busy_everywhere_is_told_at_once_in_the_last_workers_words(start_router: StartRouter) -> None:
    full = answering(429, extra="retry-after: 17\r\n", message="slow down")
    settings = {"retry_deadline": 1000, "clock": MovedClock()}
    async with fake_workers(full, full) as workers, start_router(workers, **settings) as router:
        response = await router.complete()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "17"
        assert response.json()["error"]["message"] == "slow down"
        assert counts(workers) == [1, 1]
        assert router.metric("worker_states", state="paused") == 2


async def test_a_full_worker_that_is_the_only_one_is_not_asked_again_before_its_time(start_router: StartRouter) -> None:
    full = answering(503, extra="retry-after: 17\r\n", message="my queue is full")
    clock = MovedClock()
    async with fake_workers(full) as workers, start_router(workers, clock=clock, retry_deadline=1000) as router:
        asked = asyncio.create_task(router.complete())
        await until(lambda: router.metric("worker_states", state="paused") == 1)
        clock.now += 16
        response = await asked
        assert (response.status_code, response.headers["retry-after"]) == (503, "17")
        assert response.json()["error"]["message"] == "my queue is full"
        assert counts(workers) == [1]


async def test_a_worker_that_leaves_with_a_retry_after_makes_requests_wait_for_the_next(
    start_router: StartRouter,
) -> None:
    leaving, still = answering(503, extra="retry-after: 1\r\n"), {"clock": MovedClock(), "retry_deadline": 1000}
    async with fake_workers(leaving, good) as (old, new), start_router([old], **still) as router:
        old.health = 503
        waiting = asyncio.create_task(router.complete())
        await router.ready(0)
        router.router.fleet_sync.apply({old.url: DiscoveredWorker(Intake.CLOSED), new.url: DiscoveredWorker()})
        response = await waiting
        assert (response.status_code, response.headers["x-kvcluster-worker"]) == (200, new.url)
        assert len(old.received) == 1


async def test_a_worker_that_asks_for_a_pause_gets_one_and_is_shown_so(start_router: StartRouter) -> None:
    full = answering(503, extra="retry-after: 20\r\n")
    async with fake_workers(full, good) as workers, start_router(workers, clock=MovedClock()) as router:
        for _ in range(6):
            assert (await router.complete()).status_code == 200
        assert counts(workers) == [1, 6]
        shown = (await router.management.get("/workers")).json()["workers"][0]
        assert (shown["state"], shown["ready"], shown["state_until"]) == ("paused", False, 20)


async def test_an_ejected_worker_is_shown_everywhere_and_comes_back_when_it_is_well(start_router: StartRouter) -> None:
    clock = MovedClock()
    async with fake_workers(answering(500), good) as workers, start_router(workers, clock=clock) as router:
        for _ in range(12):
            assert (await router.complete()).status_code == 200
        assert len(workers[0].received) == 5
        assert router.metric("ejections_total", reason="consecutive") == 1
        assert router.metric("worker_states", state="ejected") == 1
        shown = (await router.management.get("/workers")).json()["workers"][0]
        assert shown["state"] == "ejected"
        assert "5 requests in a row failed" in shown["why_not_ready"]
        explained = (await router.management.post("/route/explain", json={"prompt": "x"})).json()
        assert [(each["worker"], each["state"]) for each in explained["left_out"]] == [(workers[0].url, "ejected")]
        workers[0].script = good
        clock.now += router.router.fleet.config.outliers.first_seconds
        await until(lambda: router.metric("worker_states", state="half_open") == 1)
        for _ in range(6):
            assert (await router.complete()).status_code == 200
        assert router.metric("worker_states", state="serving") == 2
        assert len(workers[0].received) > 5


async def test_a_draining_worker_that_still_accepts_is_used_when_it_is_the_last(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as workers, start_router(workers) as router:
        workers[0].draining = True
        router.router.fleet_sync.busy(workers[0].url)
        await router.ready(1)
        for _ in range(4):
            assert (await router.complete()).headers["x-kvcluster-worker"] == workers[1].url
        assert router.metric("worker_states", state="draining") == 1
        await workers[1].stop(reset=True)
        assert (await router.complete()).headers["x-kvcluster-worker"] == workers[0].url
        workers[0].draining = False
        await until(lambda: router.metric("worker_states", state="serving") == 1)
