"""Static lists and files of workers, and what the router does when a list changes.

Covered: workers that come, go, drain, are replaced at their address, or have feeds elsewhere. Not covered:
EndpointSlices (test_endpointslices.py, test_routing.py), and settings that name lists (test_settings.py).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvcache.feed import Stored
from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer
from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker
from router.discovery.sources import FileDiscovery, StaticDiscovery, WorkerUrlError, worker_url
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import Connection, FakeWorker, Received, fake_workers, good, streaming, token


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.1:8100", "http://10.0.0.1:8100"),
        (" http://Host.Example:8100/ ", "http://host.example:8100"),
        ("https://host", "https://host"),
        ("http://[::1]:8100", "http://[::1]:8100"),
    ],
)
def test_urls_have_one_form(text: str, url: str) -> None:
    assert worker_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "host:8100", "ftp://h:1", "http://h:1/v1", "http://", "http://h:x", "http://h?q=1", "http://h:1#rank=1"],
)
def test_what_is_no_workers_url(text: str) -> None:
    with pytest.raises(WorkerUrlError, match="URL"):
        worker_url(text)


async def test_a_static_list_is_told_once() -> None:
    assert [workers async for workers in StaticDiscovery(["http://a:1", "http://a:1/"]).watch()] == [
        {"http://a:1": DiscoveredWorker()}
    ]


async def test_a_worker_whose_feed_is_at_another_address(tmp_path: Path) -> None:
    listed = {"http://a:1": DiscoveredWorker(feed="http://a:2"), "http://b:1": DiscoveredWorker()}
    entries = ["http://a:1", "feed=http://a:2/", "http://b:1", "feed=http://b:1"]
    assert await anext(StaticDiscovery(entries).watch()) == listed
    path = tmp_path / "workers"
    path.write_text("http://a:1, feed=http://a:2  # an agent's\nhttp://b:1\n")
    assert await anext(FileDiscovery(path, interval=0.01).watch()) == listed


async def test_an_agent_listed_as_a_worker_gets_no_request(
    start_router: StartRouter, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_workers(good, good) as (engine, agent), start_router() as router:
        agent.serve_feed(tokenizer.fingerprint, "pod", engine=engine.url)
        router.router.fleet_sync.apply({agent.url: DiscoveredWorker()})
        await until(lambda: "worker_unmatched" in caplog.text)
        assert router.candidates() == 0
        response = await router.complete()
        assert (response.status_code, len(agent.received)) == (503, 0)
        (row,) = (await router.management.get("/workers")).json()["workers"]
        assert not row["ready"]
        assert f"as in --workers http://ENGINE:PORT,feed={agent.url}" in row["why_not_ready"]
        assert router.metric("feed_refusals_total", reason="agent") == 1
        # As its message says.
        router.router.fleet_sync.apply({engine.url: DiscoveredWorker(feed=agent.url)})
        await until(lambda: any(worker.matching for worker in router.router.fleet.workers(router.router.clock())))
        await router.ready(1)
        assert (await router.complete()).headers["x-kvcluster-worker"] == "pod"
        assert (len(engine.received), len(agent.received)) == (1, 0)


async def test_a_file_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_text("# workers\nhttp://a:1\n\nhttp://b:2  # the second\n")
    seen = FileDiscovery(path, interval=0.01).watch()
    assert await anext(seen) == {"http://a:1": DiscoveredWorker(), "http://b:2": DiscoveredWorker()}
    path.write_text("http://b:2\n")
    assert await anext(seen) == {"http://b:2": DiscoveredWorker()}


@pytest.mark.parametrize("bad", [b"http://a:1\nnot a url\n", b"\xff\xff", None], ids=["line", "encoding", "missing"])
async def test_an_unusable_file_leaves_the_last_list_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes | None
) -> None:
    path = tmp_path / "workers"
    path.write_text("http://a:1\n")
    seen = FileDiscovery(path, interval=0.01).watch()
    await anext(seen)
    changed = asyncio.ensure_future(anext(seen))
    if bad is None:
        path.unlink()
    else:
        path.write_bytes(bad)
    await until(lambda: "workers_file_unusable" in caplog.text)
    assert not changed.done()
    (tmp_path / "new").write_text("http://b:2\n")
    (tmp_path / "new").replace(path)
    assert await changed == {"http://b:2": DiscoveredWorker()}


async def test_workers_come_and_go(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one]) as router:
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(), two.url: DiscoveredWorker()})
        await router.ready(2)
        router.router.fleet_sync.apply({two.url: DiscoveredWorker()})
        assert router.candidates() == 1
        for _ in range(3):
            assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        assert one.received == []


async def test_a_terminating_worker_gets_nothing_new(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one, two]) as router:
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(Intake.CLOSED), two.url: DiscoveredWorker()})
        for _ in range(3):
            assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        (status,) = [s for s in router.router.fleet.workers(router.router.clock()) if s.url == one.url]
        assert not status.ready
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(), two.url: DiscoveredWorker()})
        assert router.candidates() == 2


async def test_unanswered_requests_of_a_removed_worker_go_elsewhere(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one, two]) as router:
        one.frozen.set()
        running = asyncio.create_task(router.complete())
        await until(lambda: len(router.router.in_flight) == 1)
        router.router.fleet_sync.apply({two.url: DiscoveredWorker()})
        assert (await running).headers["x-kvcluster-worker"] == two.url


# --- pods and feeds -------------------------------------------------------------------------------------

KEYS = block_keys(range(320), 16)
CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]


def held(router: RunningRouter, worker: FakeWorker) -> int:
    """Blocks the router believes this worker to hold."""
    return sum(router.router.fleet.held_blocks(worker.url).values())


async def test_another_pod_at_the_same_address_is_another_worker(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async def hangs(connection: Connection, request: Received) -> None:
        await connection.closed()

    async with fake_workers(hangs, good) as (one, two), start_router() as router:
        one.serve_feed(tokenizer.fingerprint, "pod-a")
        one.blocks = CHAIN[:5]
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(pod="pod-a", uid="a"), two.url: DiscoveredWorker()})
        await until(lambda: held(router, one) == 5)
        await router.ready(2)
        waiting = asyncio.create_task(router.complete())
        await until(lambda: len(one.received) == 1)
        one.drop_feeds()
        one.name, one.epoch, one.blocks = "pod-b", 1, []  # an epoch says nothing about another process
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(pod="pod-b", uid="b"), two.url: DiscoveredWorker()})
        assert held(router, one) == 0
        assert (await waiting).headers["x-kvcluster-worker"] == two.url
        await until(lambda: "pod-b" in {status.worker_id for status in router.router.fleet.workers(0.0)})
        await router.ready(2)
        (shown,) = [w for w in (await router.management.get("/workers")).json()["workers"] if w["url"] == one.url]
        assert (shown["pod"], shown["worker_id"], shown["blocks"]) == ("pod-b", "pod-b", 0)


async def test_a_worker_that_is_not_ready_for_a_moment_keeps_its_view(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    async with fake_workers(good) as (one,), start_router() as router:
        one.serve_feed(tokenizer.fingerprint)
        one.blocks = CHAIN[:5]
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(uid="a")})
        await until(lambda: held(router, one) == 5 and len(one.feeds) == 1)
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(Intake.CLOSED, uid="a")})
        assert router.candidates() == 0
        await one.publish(Stored(KEYS[4], (KEYS[5],)))
        await until(lambda: held(router, one) == 6)
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(uid="a")})
        assert router.candidates() == 1
        assert one.snapshots == 1


async def test_a_worker_first_listed_as_not_ready_gets_nothing(start_router: StartRouter) -> None:
    async with fake_workers(good) as (one,), start_router(retry_deadline=20) as router:
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(Intake.CLOSED)})
        waiting = asyncio.create_task(router.complete())
        await until(lambda: router.router.fleet.workers(0.0)[0].why_not_ready == "it is terminating or not ready")
        assert one.received == []
        router.router.fleet_sync.apply({one.url: DiscoveredWorker()})
        assert (await waiting).status_code == 200


async def test_a_terminating_worker_finishes_what_it_has(start_router: StartRouter) -> None:
    release = asyncio.Event()
    slow = streaming(token("a"), release=release, rest=[token("b", "length")])
    async with fake_workers(slow, good) as (one, two), start_router([one, two]) as router:
        running = asyncio.create_task(router.stream())
        await until(lambda: len(router.router.in_flight) == 1)
        router.router.fleet_sync.apply({one.url: DiscoveredWorker(Intake.CLOSED), two.url: DiscoveredWorker()})
        assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        router.router.fleet_sync.apply({two.url: DiscoveredWorker()})
        release.set()
        assert await running == token("a") + token("b", "length")


async def test_a_feed_at_an_address_of_its_own(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as (engine, agent), start_router() as router:
        agent.serve_feed(tokenizer.fingerprint, "pod")
        agent.blocks = CHAIN[:5]
        router.router.fleet_sync.apply({engine.url: DiscoveredWorker(feed=agent.url)})
        await until(lambda: held(router, engine) == 5)
        await router.ready(1)
        assert (await router.complete()).headers["x-kvcluster-worker"] == "pod"
        assert (len(engine.received), len(agent.received)) == (1, 0)
        # The agent is gone: the view is lost for a while, the engine serves on.
        await agent.stop(reset=True)
        agent.feeds.clear()
        await until(lambda: router.metric("feed_connects_total", outcome="failed") > 0)
        assert router.candidates() == 1
        await agent.start()
        await until(lambda: len(agent.feeds) == 1)
        # The engine is gone: its agent's feed is no sign of its life.
        await engine.stop(reset=True)
        await router.ready(0)
        await agent.publish(Stored(KEYS[4], (KEYS[5],)))
        await until(lambda: held(router, engine) == 6)
        assert router.candidates() == 0
        await engine.start()
        await router.ready(1)


async def test_the_view_of_a_dead_agent_is_not_used_and_said_not_to_be(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    prompt, clock = {"prompt": list(range(320)), "max_tokens": 2}, MovedClock()
    async with (
        fake_workers(good, good, good) as (engine, other, agent),
        start_router(routing_strategy="cache_aware", clock=clock) as router,
    ):
        agent.serve_feed(tokenizer.fingerprint, "pod")
        agent.blocks = CHAIN
        router.router.fleet_sync.apply({engine.url: DiscoveredWorker(feed=agent.url), other.url: DiscoveredWorker()})
        await router.ready(2)
        await until(lambda: len(agent.feeds) == 1)
        await agent.publish(seq=0)
        response = await router.client.post("/v1/completions", json=prompt)
        assert response.headers["x-kvcluster-matched-blocks"] == "19"
        await agent.stop(reset=True)
        agent.feeds.clear()
        await until(lambda: router.metric("feed_connects_total", outcome="failed") > 0)
        await router.silence(clock, alive=(engine, other))
        assert not any(worker.matching for worker in router.router.fleet.workers(clock()))
        assert router.candidates() == 2
        response = await router.client.post("/v1/completions", json=prompt)
        assert response.headers["x-kvcluster-matched-blocks"] == "0"
        assert response.headers["x-kvcluster-reason"] == "no_match"
        rows = (await router.management.get("/workers")).json()["workers"]
        (row,) = [row for row in rows if row["worker_id"] == "pod"]
        assert row["ready"]
        assert not row["matching"]
        assert "nothing has confirmed" in row["why_not_matching"]
        assert (await router.management.get("/status")).json()["workers"]["matching"] == 0
        assert router.metric("workers", state="unmatched") == 1
        assert router.metric("workers", state="history") == 1, "the other worker has no feed at all"
        explained = (await router.management.post("/route/explain", json=prompt)).json()
        (candidate,) = [each for each in explained["candidates"] if each["worker"] == "pod"]
        assert (candidate["matched_blocks"], candidate["matching"]) == (0, False)
        assert candidate["why_not_matching"] == row["why_not_matching"]
        await agent.start()
        await until(lambda: len(agent.feeds) == 1)
        await agent.publish(seq=0)
        response = await router.client.post("/v1/completions", json=prompt)
        assert response.headers["x-kvcluster-matched-blocks"] == "19"


async def test_a_worker_whose_agent_has_never_answered_is_matched_by_what_was_sent_there_until_it_does(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    prompt = {"prompt": list(range(320)), "max_tokens": 2}
    async with (
        fake_workers(good, good) as (engine, agent),
        start_router(routing_strategy="cache_aware") as router,
    ):
        agent.serve_feed(tokenizer.fingerprint, "pod")
        agent.blocks = CHAIN
        await agent.stop(reset=True)
        router.router.fleet_sync.apply({engine.url: DiscoveredWorker(feed=agent.url)})
        await router.ready(1)
        await until(lambda: router.metric("workers", state="history") == 1)
        matched = []
        for _ in range(2):
            response = await router.client.post("/v1/completions", json=prompt)
            matched.append(int(response.headers["x-kvcluster-matched-blocks"]))
        assert matched[0] == 0
        assert matched[1] >= 19
        await agent.start()
        await until(lambda: len(agent.feeds) == 1)
        await agent.publish(seq=0)
        await until(lambda: router.metric("workers", state="history") == 0)
        assert held(router, engine) == len(CHAIN)


async def test_a_request_waits_for_workers_that_come_later(start_router: StartRouter) -> None:
    """A rolling restart of the only worker: the old one drains, then is gone, then another one comes."""

    async def draining(connection: Connection, request: Received) -> None:
        await connection.answer(503, b'{"error":{}}')

    async with fake_workers(draining, good) as (old, new), start_router([old], retry_deadline=20) as router:
        old.health = 503
        waiting = asyncio.create_task(router.complete())
        await until(lambda: router.candidates() == 0)
        router.router.fleet_sync.apply({old.url: DiscoveredWorker(Intake.CLOSED)})
        router.router.fleet_sync.apply({})
        assert not waiting.done()
        router.router.fleet_sync.apply({new.url: DiscoveredWorker()})
        response = await waiting
        assert response.status_code == 200
        assert response.headers["x-kvcluster-worker"] == new.url


async def test_an_unusable_file_is_said_by_readiness(start_router: StartRouter, tmp_path: Path) -> None:
    path = tmp_path / "workers"
    async with fake_workers(good) as (one,), start_router(source=FileDiscovery(path, interval=0.01)) as router:
        await until(lambda: router.router.management.discovery().error != "")
        response = await router.management.get("/ready")
        assert response.status_code == 503
        assert "the workers are not known yet: " in response.json()["reason"]
        assert str(path) in response.json()["reason"]
        path.write_text(one.url)
        await router.ready(1)
        path.write_text("nonsense")
        await until(lambda: router.router.management.discovery().error != "")
        response = await router.management.get("/ready")
        assert response.status_code == 200
        assert response.json()["discovery"]["healthy"] is False
        assert router.metric("discovery_age_seconds") >= 0


async def test_idle_connections_to_a_removed_worker_are_closed_at_once(start_router: StartRouter) -> None:
    closed = asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await good(connection, request)
        await connection.closed()
        closed.set()

    async with fake_workers(script) as workers, start_router(workers) as router:
        await router.complete()
        assert not closed.is_set()
        router.router.fleet_sync.apply({})
        await until(closed.is_set)
