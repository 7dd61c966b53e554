"""Push: a router that cannot read the feed is kept informed, and an absent router costs little.

Not covered: what the router makes of the messages (`tests/e2e`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import pytest

from kvcache.feed import (
    JSON,
    MSGPACK,
    Heartbeat,
    decode_eviction,
    decode_heartbeat,
    decode_snapshot,
)
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.processes import eventually
from worker.addresses import advertised_url
from worker.feed.push import Pusher, PushError, posting_to
from worker.main import push
from worker.settings import Settings

pytestmark = pytest.mark.looptime


class Router:
    """Takes what is pushed, with the time; `away` refuses everything."""

    def __init__(self) -> None:
        self.got: list[tuple[float, str, Any]] = []
        self.attempts = 0
        self.away = False
        self.resync = False

    async def __call__(self, path: str, body: bytes, media_type: str) -> bytes:
        self.attempts += 1
        if self.away:
            raise PushError("connection refused")
        read: dict[str, Callable[[bytes], Any]] = {
            "/internal/heartbeat": decode_heartbeat,
            "/internal/sync": lambda data: decode_snapshot(data, MSGPACK),
            "/internal/eviction": decode_eviction,
        }
        assert media_type == (MSGPACK if path == "/internal/sync" else JSON)
        self.got.append((asyncio.get_running_loop().time(), path.rpartition("/")[2], read[path](body)))
        resync, self.resync = self.resync, False
        return b'{"resync": %s}' % (b"true" if resync else b"false")

    def times(self, what: str) -> list[float]:
        return [at for at, name, _ in self.got if name == what]


@contextlib.asynccontextmanager
async def pushing(start: Callable[..., Any]) -> AsyncIterator[tuple[Any, Router, Pusher]]:
    """A worker that pushes to a router. (No fixture: its setup would see another clock than the test.)"""
    harness, router = start(blocks=40, max_model_len=None, worker_id="w"), Router()
    pusher = Pusher("http://router", "http://me:8100", harness.rank.state, harness.rank.feed)
    task = asyncio.create_task(pusher.run(router))
    try:
        yield harness, router, pusher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_heartbeat_every_second_and_a_sync_every_five(start) -> None:
    async with pushing(start) as (harness, router, _):
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(11)
        beats = [at - began for at in router.times("heartbeat")]
        assert beats == pytest.approx([float(n) for n in range(len(beats))], abs=0.05)
        assert len(beats) >= 11
        assert [at - began for at in router.times("sync")] == pytest.approx([0, 5, 10], abs=0.05)
        beat = router.got[0][2]
        assert beat == Heartbeat(harness.worker.info, "http://me:8100", 0, harness.rank.engine.load())


async def test_a_sync_holds_the_whole_cache(start) -> None:
    async with pushing(start) as (harness, router, _):
        await harness.client.post("/v1/completions", {"prompt": [5] * 100, "max_tokens": 1})
        await asyncio.sleep(6)
        snapshot = router.got[[name for _, name, _ in router.got].index("sync", 2)][2]
        assert snapshot.blocks == tuple(harness.rank.engine.blocks())
        assert snapshot.seq == harness.rank.feed.seq


async def test_a_router_that_asks_gets_the_state_at_once(start) -> None:
    async with pushing(start) as (_, router, _):
        await asyncio.sleep(1.5)
        router.resync = True
        await asyncio.sleep(1.0)
        assert router.times("sync")[-1] == router.times("heartbeat")[-1]
        assert len(router.times("sync")) == 2


async def test_evictions_are_pushed_soon_and_in_batches(start) -> None:
    async with pushing(start) as (harness, router, _):
        feed = harness.rank.feed
        for n in range(8):
            body = {"prompt": [n] * 300, "max_tokens": 10, "ignore_eos": True}
            await harness.client.post("/v1/completions", body)
        await asyncio.sleep(0.2)
        evictions = [message for _, name, message in router.got if name == "eviction"]
        assert sum(len(message.keys) for message in evictions) > 40
        assert all((message.worker_id, message.epoch) == ("w", harness.worker.epoch) for message in evictions)
        assert evictions[-1].seq == feed.seq
        times = router.times("eviction")
        assert all(later - earlier > 0.09 for earlier, later in pairwise(times))


async def test_attempts_to_reach_an_absent_router_back_off_and_are_logged_once(start, caplog) -> None:
    async with pushing(start) as (_, router, pusher):
        caplog.set_level(logging.INFO)
        await asyncio.sleep(1.5)
        router.away = True
        before = router.attempts
        await asyncio.sleep(60)
        assert router.attempts - before < 25
        assert pusher.failures == router.attempts - before
        router.away = False
        await asyncio.sleep(6)
        assert [record.getMessage() for record in caplog.records] == ["router_reached", "router_lost", "router_reached"]
        assert router.times("sync")[-1] - router.times("heartbeat")[-1] < 5
        assert [name for _, name, _ in router.got[-8:]].count("sync") >= 1


async def test_an_answer_that_no_router_gives_counts_as_a_failure(start) -> None:
    rank = start().rank

    async def website(path: str, body: bytes, media_type: str) -> bytes:
        return b"<html>"

    pusher = Pusher("http://x", "http://me", rank.state, rank.feed)
    task = asyncio.create_task(pusher.run(website))
    await asyncio.sleep(0.1)
    assert (pusher.connected, pusher.failures) == (False, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.looptime(False)
async def test_messages_go_over_http() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        seen.append((scope["method"], scope["path"], headers[b"content-type"], (await receive())["body"]))
        status = 409 if scope["path"] == "/refused" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    server = HttpServer(app, listen("127.0.0.1", 0))
    await server.start()
    url = f"http://127.0.0.1:{server.port}"
    async with posting_to(url) as post:
        assert await post("/internal/heartbeat", b"body", JSON) == b"{}"
        with pytest.raises(PushError, match="refused: 409"):
            await post("/refused", b"", JSON)
    assert seen[0] == ("POST", "/internal/heartbeat", b"application/json", b"body")
    await server.stop(0.0)
    async with posting_to(url) as post:
        with pytest.raises(PushError):
            await post("/internal/heartbeat", b"", JSON)


@pytest.mark.looptime(False)
async def test_every_data_parallel_rank_is_pushed_under_one_url(start) -> None:
    beats: list[Heartbeat] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/internal/heartbeat":
            beats.append(decode_heartbeat(body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    server = HttpServer(app, listen("127.0.0.1", 0))
    await server.start()
    url = f"http://127.0.0.1:{server.port}"
    settings = Settings(model="m", data_parallel_size=3, router_url=(url,), worker_id="w")
    task = asyncio.create_task(push(start(data_parallel_size=3, worker_id="w").worker, settings, 8100))
    await eventually(lambda: len(beats) == 3, "each has sent a heartbeat")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop(0.0)
    assert {(beat.info.worker_id, beat.info.rank, beat.info.ranks) for beat in beats} == {
        (f"w/{rank}", rank, 3) for rank in range(3)
    }
    assert {beat.url for beat in beats} == {"http://127.0.0.1:8100"}


@pytest.mark.looptime(False)
async def test_the_advertised_url_is_one_that_the_router_can_reach() -> None:
    assert advertised_url("10.1.2.3", 8100, "http://router:9000") == "http://10.1.2.3:8100"
    assert advertised_url("0.0.0.0", 8100, "http://127.0.0.1:9000") == "http://127.0.0.1:8100"
    assert advertised_url("::1", 8100, "http://[::1]:9000") == "http://[::1]:8100"


@pytest.mark.timeout(20)
async def test_a_timer_that_fires_a_tick_early_makes_nothing_spin(start) -> None:
    """An event loop runs timers that are due within the resolution of its clock: here a time that is never met."""
    for offset in range(60):
        await asyncio.sleep(offset * 0.013457)
        async with pushing(start) as (_, router, _):
            await asyncio.sleep(10.5)
            assert len(router.times("heartbeat")) == 11
