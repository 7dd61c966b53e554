"""Following workers' cache feeds: the view is the worker's state, whatever happens to the stream.

Covered: snapshots, batches, gaps, resets, restarts, garbage, workers that cannot be matched. Not covered: what the
fleet makes of each message (tests/router/core), pauses between attempts (test_loops.py), pushed feeds
(test_management.py), an agent's feed (tests/e2e/test_agent_feed.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from kvcache.feed import Cleared, Removed, Stored
from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer
from router.core.fleet import Fleet
from router.metrics import Metrics, by_label
from router.sync.subscriber import FeedPolicy, Subscriber
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.core.support import config
from tests.router.fakes import FakeWorker, fake_workers, good

KEYS = block_keys(range(320), 16)
TRUST = ("exact", "partial", "none")
CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]


@asynccontextmanager
async def followed(
    start_router: StartRouter, tokenizer: Tokenizer, **settings: object
) -> AsyncIterator[tuple[FakeWorker, RunningRouter]]:
    """A worker with 5 blocks and a router that follows it."""
    async with fake_workers(good) as (worker,):
        worker.serve_feed(tokenizer.fingerprint, "w")
        worker.blocks = CHAIN[:5]
        async with start_router([worker], **settings) as router:
            await until(lambda: len(worker.feeds) == router.metric("feed_connects_total", outcome="connected") == 1)
            yield worker, router


def view(router: RunningRouter, worker: FakeWorker) -> Counter[bytes]:
    return Counter(router.router.fleet.held_blocks(worker.url))


async def holds(router: RunningRouter, worker: FakeWorker, *keys: bytes) -> None:
    await until(lambda: view(router, worker) == Counter(keys))


async def test_snapshot_then_changes(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await holds(router, worker, *KEYS[:5])
        await worker.publish(Removed((KEYS[4],)), Stored(KEYS[3], (KEYS[4], KEYS[5])))
        await worker.publish(Stored(KEYS[5], (KEYS[6],)))
        await holds(router, worker, *KEYS[:7])
        await worker.publish(Cleared())
        await holds(router, worker)
        assert worker.snapshots == 1
        assert worker.feed_positions == ["1:0"]


async def test_the_view_decides_where_requests_go(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
        workers[1].blocks = CHAIN
        async with start_router(workers, routing_strategy="cache_aware") as router:
            await holds(router, workers[1], *KEYS)
            response = await router.complete(list(range(320)))
            assert response.headers["x-kvcluster-worker"] == "w1"
            assert response.headers["x-kvcluster-reason"] == "prefix_match"
            assert response.headers["x-kvcluster-matched-blocks"] == "19"  # the block of the last token is recomputed


async def test_a_broken_stream_is_resumed_where_it_stood(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await worker.publish(Stored(KEYS[4], (KEYS[5],)))
        await holds(router, worker, *KEYS[:6])
        worker.drop_feeds()
        await until(lambda: len(worker.feeds) == 1)
        assert worker.feed_positions == ["1:0", "1:1"]
        assert worker.snapshots == 1
        await worker.publish(Stored(KEYS[5], (KEYS[6],)))
        await holds(router, worker, *KEYS[:7])


async def test_a_gap_takes_a_new_snapshot(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        worker.blocks = CHAIN[:9]
        await worker.publish(Stored(KEYS[7], (KEYS[8],)), seq=7)
        await holds(router, worker, *KEYS[:9])
        assert worker.snapshots == 2
        await until(lambda: worker.feed_positions[-1] == "1:7")
        assert router.metric("feed_gaps_total", reason="missing") == router.metric("feed_gaps_total") == 1


async def test_a_reset_takes_a_new_snapshot(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        worker.blocks, worker.seq = CHAIN[:2], 40
        await worker.send_event("reset", b"{}")
        await holds(router, worker, *KEYS[:2])
        assert worker.snapshots == 2
        assert router.metric("feed_gaps_total", reason="reset") == router.metric("feed_gaps_total") == 1


async def test_a_new_epoch_within_a_stream_takes_a_new_snapshot(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        worker.epoch, worker.blocks = 2, CHAIN[:3]
        await worker.publish(seq=0)
        await holds(router, worker, *KEYS[:3])
        assert worker.snapshots == 2
        assert router.metric("feed_gaps_total", reason="restarted") == router.metric("feed_gaps_total") == 1


async def test_the_trust_in_a_view_says_what_it_rests_on(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    clock = MovedClock()
    async with fake_workers(good) as (worker,):
        worker.blocks = CHAIN[:5]
        async with start_router([worker], clock=clock, liveness_timeout=1e6, view_timeout=10) as router:

            def trust(name: str) -> dict[str, float]:
                return {each: router.metric("view_trust", worker=name, trust=each) for each in TRUST}

            assert trust(worker.url) == {"exact": 0, "partial": 1, "none": 0}, "only what this router sent is known"
        worker.serve_feed(tokenizer.fingerprint)
        async with start_router([worker], clock=clock, liveness_timeout=1e6, view_timeout=10) as router:
            await holds(router, worker, *KEYS[:5])
            assert trust(worker.name) == {"exact": 1, "partial": 0, "none": 0}
            clock.now += 11  # nothing confirms it
            assert trust(worker.name) == {"exact": 0, "partial": 0, "none": 1}
            await until(lambda: len(worker.feeds) == 1)
            await worker.publish(Removed((KEYS[9],)))  # which the view did not hold
            await until(lambda: trust(worker.name) == {"exact": 0, "partial": 1, "none": 0})
        worker.complete = False
        worker.feeds.clear()
        async with start_router([worker], clock=clock, liveness_timeout=1e6) as router:
            await until(lambda: len(worker.feeds) == 1)
            assert trust(worker.name) == {"exact": 0, "partial": 1, "none": 0}
            await worker.publish(Cleared())
            await until(lambda: trust(worker.name) == {"exact": 1, "partial": 0, "none": 0})
        worker.fingerprint = "another"
        async with start_router([worker], clock=clock, liveness_timeout=1e6) as router:
            await until(lambda: trust(worker.name) == {"exact": 0, "partial": 0, "none": 1})


async def test_a_restarted_worker_starts_with_what_it_holds_now(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await holds(router, worker, *KEYS[:5])
        await worker.stop(reset=True)
        await until(lambda: router.candidates() == 0)
        worker.epoch, worker.seq, worker.blocks = 2, 0, CHAIN[:1]
        await worker.start()
        await holds(router, worker, KEYS[0])
        await router.ready(1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"garbage", id="text"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(b'{"epoch":1,"seq":1,"events":[{"type":"stored","keys":["zz"]}],"load":{}}', id="bad key"),
        pytest.param(b"\xff" * 100, id="not UTF-8"),
    ],
)
async def test_garbage_in_the_stream_takes_a_new_snapshot(
    start_router: StartRouter, tokenizer: Tokenizer, data: bytes
) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await worker.send_event("batch", data)
        await until(lambda: worker.snapshots == 2)
        await holds(router, worker, *KEYS[:5])
        assert router.metric("feed_refusals_total", reason="malformed") == 1
        assert (await router.complete()).status_code == 200


async def test_an_event_without_end_is_an_error_not_memory(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        for _ in range(9):
            for feed in list(worker.feeds):
                await feed.chunk(b"data: " + b"x" * 2**20)
        await until(lambda: worker.snapshots == 2)
        assert router.metric("feed_refusals_total", reason="malformed") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"block_size": 24}, "block_size", id="block size"),
        pytest.param({"fingerprint": "0" * 32}, "fingerprint", id="fingerprint"),
    ],
)
async def test_a_worker_that_cannot_be_matched_is_routed_to_by_load_and_named(
    start_router: StartRouter, tokenizer: Tokenizer, change: dict[str, object], reason: str
) -> None:
    async with fake_workers(good) as (worker,):
        worker.serve_feed(tokenizer.fingerprint, "w")
        worker.blocks = CHAIN[:5]
        for name, value in change.items():
            setattr(worker, name, value)
        async with start_router([worker], routing_strategy="cache_aware") as router:
            await until(lambda: len(worker.feeds) == 1)
            await worker.publish(Stored(KEYS[4], (KEYS[5],)))
            assert (await router.complete(list(range(320)))).headers["x-kvcluster-matched-blocks"] == "0"
            (status,) = (await router.management.get("/workers")).json()["workers"]
            assert (status["ready"], status["matching"]) == (True, False)
            assert reason.replace("_", " ") in status["why_not_matching"]
            assert view(router, worker) == Counter()
            assert router.metric("feed_refusals_total", reason=reason) == 1
            assert router.metric("workers", state="unmatched") == 1


async def test_a_worker_without_a_feed_is_asked_for_its_health_and_matched_by_what_was_sent(
    start_router: StartRouter,
) -> None:
    async with fake_workers(good) as (worker,), start_router([worker]) as router:
        assert router.metric("feed_connects_total", outcome="no_feed") == 1
        prompt = list(range(320))
        assert (await router.complete(prompt)).headers["x-kvcluster-matched-blocks"] == "0"
        assert int((await router.complete(prompt)).headers["x-kvcluster-matched-blocks"]) >= 19
        assert (await router.management.get("/status")).json()["history_workers"] == 1
        assert router.metric("workers", state="history") == 1
        assert router.metric("workers", state="unmatched") == 0


async def test_view_age_is_published(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await worker.publish(Stored(KEYS[4], (KEYS[5],)))
        await holds(router, worker, *KEYS[:6])
        text = (await router.management.get("/metrics")).text
        assert 'kvcluster_router_view_age_seconds{worker="w"}' in text
        assert 'kvcluster_router_worker_blocks{worker="w"} 6.0' in text
        assert "kvcluster_router_index_blocks 6.0" in text


async def test_a_snapshot_without_end_is_an_error_not_memory(tokenizer: Tokenizer) -> None:
    metrics, fleet = Metrics(CollectorRegistry()), Fleet(config())
    async with fake_workers(good) as (worker,), aiohttp.ClientSession() as session:
        worker.serve_feed(tokenizer.fingerprint, "w")
        worker.blocks = CHAIN
        fleet.add(worker.url)
        subscriber = Subscriber(
            worker.url,
            fleet,
            session,
            metrics,
            clock=time.monotonic,
            rng=random.Random(1),
            on_connected=lambda: None,
            on_refused=lambda why: None,
            policy=FeedPolicy(max_snapshot_bytes=100),
        )
        following = asyncio.create_task(subscriber.run())
        await until(lambda: by_label(metrics.feed_refusals).get("malformed", 0) >= 1)
        following.cancel()
        assert worker.feed_positions == []
        assert fleet.index_blocks == 0


async def test_a_connection_that_is_refused_costs_no_view_while_the_feed_is_connected(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with followed(start_router, tokenizer) as (worker, router):
        await holds(router, worker, *KEYS[:5])
        router.router.fleet_sync.unreachable(worker.url, "a request could not connect")
        worker.drop_feeds()
        await until(lambda: len(worker.feeds) == 1)
        assert worker.feed_positions == ["1:0", "1:0"], "the same process goes on where it was"
        assert worker.snapshots == 1
