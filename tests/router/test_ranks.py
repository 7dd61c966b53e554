"""Data-parallel ranks: each rank of a process is a worker of its own, and the process is one address.

Covers: which rank a request goes to and how it is named, the rank that a client asks for, what the failure of a rank
and of a process does to the others, processes that restart with another number of ranks, and ranks that push. Not
covered: how an emulator and an agent serve their ranks (tests/worker/test_ranks.py, tests/worker/agent/test_ranks.py),
and whole clusters (tests/e2e/test_ranks.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvcache.feed import JSON, Heartbeat, encode_heartbeat
from kvcache.keys import block_keys
from kvcache.ranks import RANK_HEADER, asked_rank, rank_url, split_rank
from kvcache.tokens.tokenizer import Tokenizer
from router.core.worker_state import WorkerPhase
from router.upstream.interface import UpstreamRequest
from router.upstream.pool import ConnectionPool
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import (
    ERROR_EVENT,
    Connection,
    FakeWorker,
    Received,
    Script,
    answering,
    fake_workers,
    good,
    streaming,
)

KEYS = block_keys(range(320), 16)
CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]
PROMPT = list(range(320))


@asynccontextmanager
async def ranked(
    start_router: StartRouter, tokenizer: Tokenizer, *scripts: Script, ranks: int = 2, **settings: object
) -> AsyncIterator[tuple[list[FakeWorker], RunningRouter]]:
    """Processes with so many ranks each, and a router that has found all of them."""
    async with fake_workers(*scripts) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
            worker.ranks = ranks
        async with start_router(workers, ready=ranks * len(workers), **settings) as router:
            yield workers, router


def named(worker: FakeWorker) -> list[str | None]:
    """The ranks that the requests to a process named."""
    return [request.header(RANK_HEADER) for request in worker.received]


def phases(router: RunningRouter, worker: FakeWorker) -> list[WorkerPhase]:
    return [row.state for row in router.router.fleet.workers(router.router.clock()) if row.url.startswith(worker.url)]


async def restart(worker: FakeWorker, ranks: int) -> None:
    """Another incarnation of the process, with so many ranks."""
    worker.ranks = ranks
    worker.epoch += 1
    worker.feeds = [feed for feed in worker.feeds if not feed.writer.is_closing()]
    await worker.send_event("reset", b"{}")


def for_rank(rank: int, script: Script, other: Script = good) -> Script:
    """What one rank of a process answers, and what the others answer."""

    async def answer(connection: Connection, request: Received) -> None:
        await (script if request.header(RANK_HEADER) == str(rank) else other)(connection, request)

    return answer


def test_the_url_of_a_rank_and_back() -> None:
    assert [rank_url("http://a:1", rank) for rank in (0, 3)] == ["http://a:1", "http://a:1#rank=3"]
    assert [split_rank(url) for url in ("http://a:1", "http://a:1#rank=3")] == [("http://a:1", 0), ("http://a:1", 3)]


@pytest.mark.parametrize("fragment", ["top", "rank=", "rank=-1", "rank=1024", "rank=99999999999", "rank=\u0663"])
def test_what_is_no_url_of_a_rank(fragment: str) -> None:
    with pytest.raises(ValueError, match="not that of a rank"):
        split_rank(f"http://a:1#{fragment}")


async def test_each_rank_is_a_worker_with_a_view_of_its_own(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
            worker.ranks = 2
        workers[1].rank_blocks[1] = CHAIN
        async with start_router(workers, ready=4, routing_strategy="cache_aware") as router:
            url = rank_url(workers[1].url, 1)
            await until(lambda: len(router.router.fleet.held_blocks(url)) == len(KEYS))
            response = await router.complete(PROMPT)
            assert response.headers["x-kvcluster-worker"] == "w1/1"
            assert response.headers["x-kvcluster-matched-blocks"] == "19"
            assert (named(workers[0]), named(workers[1])) == ([], ["1"])
            blocks = await router.management.get("/workers/w1/1/blocks")
            assert sorted(blocks.json()["keys"]) == sorted(key.hex() for key in KEYS)
            page = (await router.management.get("/status")).json()
            assert page["workers"] == {"known": 2, "ready": 2, "matching": 2}
            assert page["ranks"] == {"known": 4, "ready": 4, "matching": 4}


async def test_every_rank_is_named_and_a_single_engine_is_not(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with ranked(start_router, tokenizer, good) as ((worker,), router):
        assert [(await router.complete()).status_code for _ in range(4)] == [200] * 4
        assert named(worker) == ["0", "1", "0", "1"]
        await restart(worker, ranks=1)
        await router.ready(1)
        await router.complete()
        assert named(worker)[4:] == [None]


async def test_the_ranks_of_an_address_share_its_connections_until_the_last_is_removed() -> None:
    async with fake_workers(good) as (worker,):
        pool = ConnectionPool(connect_timeout=1)

        async def send(url: str) -> None:
            response = await pool.send(url, UpstreamRequest("GET", "/", [], b"", rank=split_rank(url)[1]))
            while await response.read():
                pass
            response.close()

        before = len(worker._writers)
        for rank in (1, 0, 1):
            await send(rank_url(worker.url, rank))
        accepted = len(worker._writers) - before
        pool.remove(worker.url)
        await send(rank_url(worker.url, 1))
        assert (accepted, len(worker._writers) - before) == (1, 1)
        pool.remove(rank_url(worker.url, 1))
        await until(lambda: len(worker._writers) == before)
        await pool.close()
        assert named(worker) == ["1", "0", "1", "1"]


# --- the rank that a client asks for ---


async def test_a_client_may_choose_the_rank(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with ranked(start_router, tokenizer, good, good, routing_strategy="cache_aware") as (workers, router):
        for _ in range(4):
            answer = await router.client.post("/v1/completions", json={"prompt": PROMPT}, headers={RANK_HEADER: "1"})
            assert answer.headers["x-kvcluster-worker"] in ("w0/1", "w1/1")
        assert {rank for worker in workers for rank in named(worker)} == {"1"}
        explained = await router.management.post("/route/explain", json={"prompt": PROMPT}, headers={RANK_HEADER: "1"})
        assert {each["worker"] for each in explained.json()["candidates"]} == {"w0/1", "w1/1"}


@pytest.mark.parametrize("asked", ["7", "-1", "+07"])
async def test_a_rank_that_does_not_exist_is_refused_by_the_engine(
    start_router: StartRouter, tokenizer: Tokenizer, asked: str
) -> None:
    message = f"data_parallel_rank {int(asked)} is out of range [0, 2)."
    refuses = answering(400, message=message, kind="BadRequestError")
    async with ranked(start_router, tokenizer, refuses) as ((worker,), router):
        answer = await router.client.post("/v1/completions", json={"prompt": "x"}, headers={RANK_HEADER: asked})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
        assert named(worker) == [str(int(asked))]
        assert phases(router, worker) == [WorkerPhase.SERVING] * 2


@pytest.mark.parametrize(
    "asked", [pytest.param("", id="empty"), "x", "1.0", pytest.param("9" * 5000, id="too many digits")]
)
async def test_what_is_no_number_is_no_rank(start_router: StartRouter, tokenizer: Tokenizer, asked: str) -> None:
    assert asked_rank(asked) is None
    async with ranked(start_router, tokenizer, good) as ((worker,), router):
        answer = await router.client.post("/v1/completions", json={"prompt": "x"}, headers={RANK_HEADER: asked})
        assert (answer.status_code, named(worker)) == (200, ["0"])


# --- failures ---


@pytest.mark.parametrize(
    "script",
    [pytest.param(answering(500), id="status 500"), pytest.param(streaming(ERROR_EVENT), id="error in the stream")],
)
async def test_another_rank_of_the_pod_may_answer_what_one_ranks_engine_failed_on(
    start_router: StartRouter, tokenizer: Tokenizer, script: Script
) -> None:
    async with ranked(start_router, tokenizer, for_rank(0, script)) as ((worker,), router):
        answer = await router.complete(stream=True)
        assert (answer.status_code, answer.headers["x-kvcluster-worker"]) == (200, "w0/1")
        assert named(worker) == ["0", "1"]


async def test_a_request_that_a_process_turned_away_goes_to_another_process(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with ranked(start_router, tokenizer, answering(503), good) as ((full, other), router):
        answer = await router.complete()
        assert (answer.status_code, answer.headers["x-kvcluster-worker"][:3]) == (200, "w1/")
        assert (len(full.received), len(other.received)) == (1, 1)
        assert phases(router, full) == [WorkerPhase.PAUSED] * 2


async def test_the_end_of_a_process_takes_all_of_its_ranks(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with ranked(start_router, tokenizer, good, good) as ((gone, left), router):
        await gone.stop()
        await router.ready(2)
        assert phases(router, gone) == [WorkerPhase.UNREACHABLE] * 2
        assert [(await router.complete()).status_code for _ in range(4)] == [200] * 4
        assert named(left) == ["0", "1", "0", "1"]
        page = (await router.management.get("/status")).json()
        assert page["workers"] == {"known": 2, "ready": 1, "matching": 1}
        await gone.start()
        await router.ready(4)


async def test_a_process_that_drains_drains_with_all_of_its_ranks(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with ranked(start_router, tokenizer, good, good) as ((leaving, _), router):
        leaving.draining = True
        leaving.drop_feeds()
        await until(lambda: phases(router, leaving) == [WorkerPhase.DRAINING] * 2)


async def test_a_request_at_a_rank_that_a_restart_took_away_goes_elsewhere(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async def waits(connection: Connection, request: Received) -> None:
        await connection.closed()

    async with ranked(start_router, tokenizer, for_rank(2, waits), ranks=3) as ((worker,), router):
        asking = asyncio.gather(*(router.complete() for _ in range(3)))
        await until(lambda: len(worker.received) == 3)
        await restart(worker, ranks=2)
        answers = await asking
        assert [answer.status_code for answer in answers] == [200] * 3
        assert {answer.headers["x-kvcluster-worker"] for answer in answers} <= {"w0/0", "w0/1"}
        await restart(worker, ranks=4)
        await router.ready(4)


# --- ranks that push ---


async def test_pushed_ranks_of_one_url_are_workers_of_their_own(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good) as (worker,), start_router() as router:
        worker.serve_feed(tokenizer.fingerprint)
        worker.ranks = 2
        for rank in range(2):
            snapshot = worker.snapshot(rank)
            beat = Heartbeat(snapshot.info, worker.url, 0, snapshot.load)
            answer = await router.management.post(
                "/internal/heartbeat", content=encode_heartbeat(beat), headers={"content-type": JSON}
            )
            assert answer.json() == {"resync": True}
        assert [(await router.complete()).headers["x-kvcluster-worker"] for _ in range(2)] == ["w0/0", "w0/1"]
        assert named(worker) == ["0", "1"]
        named_twice = Heartbeat(worker.snapshot(1).info, rank_url(worker.url, 1), 0, snapshot.load)
        refused = await router.management.post("/internal/heartbeat", content=encode_heartbeat(named_twice))
        assert (refused.status_code, refused.json()["error"]["reason"]) == (409, "malformed")
