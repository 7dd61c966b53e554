"""The management port: its probes, pages and explanations, what workers may push to it, and GET /status.

Not covered: the figures of /status that come from answers, which test_figures.py holds against independent sums, and
the list of workers and its states (tests/router/core).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import httpx
import pytest

from kvcache.feed import (
    MSGPACK,
    Eviction,
    Heartbeat,
    HeldElsewhere,
    Load,
    Snapshot,
    Tier,
    WorkerInfo,
    encode_eviction,
    encode_heartbeat,
    encode_snapshot,
)
from kvcache.keys import KEY_SCHEME, block_keys
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.server import management
from router.server.management import RouterEvent
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, until
from tests.router.fakes import Connection, FakeWorker, Received, fake_workers, good

KEYS = block_keys(range(320), 16)
BLOCKS = tuple((key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS[:5]))
LOAD = Load(total_blocks=1000, free_blocks=1000)


class Pusher:
    """A worker that pushes, as `python -m worker.main --router-url` does."""

    def __init__(self, router: RunningRouter, url: str, fingerprint: str) -> None:
        self.router = router
        self.url = url
        self.info = WorkerInfo("pushed", 5, "m", 16, fingerprint, KEY_SCHEME, 1000)

    async def post(self, path: str, body: bytes, content_type: str = "application/json") -> httpx.Response:
        return await self.router.management.post(path, content=body, headers={"content-type": content_type})

    async def heartbeat(self, seq: int = 0, **info: object) -> httpx.Response:
        beat = Heartbeat(replace(self.info, **info), self.url, seq, LOAD)  # type: ignore[arg-type]
        return await self.post("/internal/heartbeat", encode_heartbeat(beat))

    async def sync(self, seq: int = 3, blocks: object = BLOCKS, media_type: str = "application/json", **info: object):  # type: ignore[no-untyped-def]
        snapshot = Snapshot(replace(self.info, **info), seq, LOAD, tuple(blocks))  # type: ignore[arg-type]
        return await self.post("/internal/sync", encode_snapshot(snapshot, media_type), media_type)

    async def evict(self, *keys: bytes, seq: int = 4, epoch: int = 5, worker: str = "pushed") -> httpx.Response:
        return await self.post("/internal/eviction", encode_eviction(Eviction(worker, epoch, seq, keys)))

    def view(self) -> Counter[bytes]:
        return Counter(self.router.router.fleet.held_blocks(self.url))


@pytest.fixture
def pusher(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    return lambda router, worker: Pusher(router, worker.url, tokenizer.fingerprint)


async def test_a_worker_registers_syncs_and_evicts_by_push(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router(routing_strategy="cache_aware") as router:
        push = pusher(router, worker)
        assert (await push.heartbeat(seq=3)).json() == {"resync": True}
        assert (await push.sync(media_type=MSGPACK)).status_code == 200
        assert push.view() == Counter(KEYS[:5])
        assert (await push.heartbeat(seq=3)).json() == {"resync": False}
        assert (await router.complete(list(range(320)))).headers["x-kvcluster-matched-blocks"] == "5"
        assert (await push.evict(KEYS[4])).status_code == 200
        assert push.view() == Counter(KEYS[:4])
        assert (await push.sync(seq=9)).status_code == 200
        assert push.view() == Counter(KEYS[:5])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"block_size": 24}, "block_size", id="block size"),
        pytest.param({"fingerprint": "0" * 32}, "fingerprint", id="fingerprint"),
        pytest.param({"key_scheme": "md5"}, "key_scheme", id="key scheme"),
        pytest.param({"epoch": 4}, "stale_epoch", id="epoch"),
    ],
)
async def test_pushes_that_do_not_fit_are_refused_by_name(
    start_router: StartRouter,
    pusher,
    change: dict[str, object],
    reason: str,  # type: ignore[no-untyped-def]
) -> None:
    async with fake_workers(good) as (worker,), start_router() as router:
        push = pusher(router, worker)
        await push.heartbeat(seq=3)
        await push.sync()
        for response in (await push.heartbeat(seq=9, **change), await push.sync(seq=9, blocks=(), **change)):
            assert 400 <= response.status_code < 500
            error = response.json()["error"]
            assert error["reason"] == reason
            assert error["message"]
        assert push.view() == Counter(KEYS[:5])
        assert router.metric("feed_refusals_total", reason=reason) == 2
        assert (await router.complete()).status_code == 200


@pytest.mark.parametrize("header", ["origin", "sec-fetch-site"])
async def test_a_web_page_cannot_register_a_worker(start_router: StartRouter, pusher, header: str) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        beat = encode_heartbeat(Heartbeat(pusher(router, worker).info, worker.url, 0, LOAD))
        for path in ("heartbeat", "sync", "eviction"):
            answer = await router.management.post(f"/internal/{path}", content=beat, headers={header: "null"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
        assert router.router.fleet.workers(0.0) == []


async def test_unknown_workers_may_not_sync_or_evict(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        push = pusher(router, worker)
        for response in (await push.sync(), await push.evict(KEYS[0])):
            assert response.status_code == 404
            assert response.json()["error"]["reason"] == "unknown_worker"
        assert (await router.management.get("/workers")).json() == {"workers": []}


async def test_stale_evictions_change_nothing(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        push = pusher(router, worker)
        await push.heartbeat(seq=3)
        await push.sync()
        response = await push.evict(KEYS[0], epoch=4)
        assert response.status_code == 409
        assert response.json()["error"]["reason"] == "stale_epoch"
        assert push.view() == Counter(KEYS[:5])


@pytest.mark.parametrize("path", ["/internal/heartbeat", "/internal/sync", "/internal/eviction"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half an object"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"worker_id": 5}', id="wrong type"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
async def test_garbage_is_refused(start_router: StartRouter, pusher, path: str, body: bytes) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        push = pusher(router, worker)
        await push.heartbeat(seq=3)
        await push.sync()
        response = await push.post(path, body)
        assert response.status_code == 400
        assert response.json()["error"]["reason"] == "malformed"
        assert push.view() == Counter(KEYS[:5])


async def test_garbage_in_msgpack_is_refused(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        push = pusher(router, worker)
        await push.heartbeat(seq=3)
        for body in (b"", b"\xc1", b"\x81\xa1a", b"\x90"):
            assert (await push.post("/internal/sync", body, MSGPACK)).status_code == 400


@pytest.mark.parametrize("url", ["", "not a url", "ftp://x:1", "http://", "file:///etc/passwd"])
async def test_a_heartbeat_needs_the_url_of_a_worker(start_router: StartRouter, pusher, url: str) -> None:  # type: ignore[no-untyped-def]
    async with start_router() as router:
        push = pusher(router, FakeWorker())
        push.url = url
        assert 400 <= (await push.heartbeat()).status_code < 500
        assert (await router.management.get("/workers")).json() == {"workers": []}


async def test_a_pushing_worker_that_falls_silent_leaves(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    clock = MovedClock()
    async with fake_workers(good) as (worker,), start_router(clock=clock) as router:
        await pusher(router, worker).heartbeat()
        assert router.candidates() == 1
        await router.silence(clock)
        assert router.candidates() == 0


async def test_health_and_readiness(start_router: StartRouter) -> None:
    async with fake_workers(good) as (worker,), start_router([worker]) as router:
        assert (await router.management.get("/health")).status_code == 200
        assert (await router.management.get("/ready")).json() == {
            "ready": True,
            "workers_ready": 1,
            "reason": None,
            "discovery": {"source": "static", "healthy": True, "age_seconds": None, "error": ""},
        }
        await worker.stop()
        await router.complete()
        response = await router.management.get("/ready")
        assert response.status_code == 503
        assert response.json()["reason"] == "no worker is ready"
        assert (await router.management.get("/health")).status_code == 200
        router.router.management.advance(RouterEvent.SIGTERM)
        router.router.management.advance(RouterEvent.DRAINED)
        assert "shutting down" in (await router.management.get("/ready")).json()["reason"]


async def test_a_router_is_ready_for_as_long_as_requests_wait_for_a_worker(start_router: StartRouter) -> None:
    clock = MovedClock()
    async with (
        fake_workers(good) as (worker,),
        start_router([worker], clock=clock, retry_deadline=10.0, liveness_timeout=1e6) as router,
    ):
        await until(lambda: router.router.fleet.ready_at is not None)
        worker.health = 503
        await router.ready(0)
        for later, status in ((9.0, 200), (2.0, 503)):
            clock.now += later
            page = await router.management.get("/ready")
            assert (page.status_code, page.json()["workers_ready"]) == (status, 0)


async def test_a_router_that_is_told_to_stop_is_ready_for_as_long_as_it_accepts(start_router: StartRouter) -> None:
    async with fake_workers(good) as (worker,), start_router([worker]) as router:
        router.router.management.advance(RouterEvent.SIGTERM)
        assert (await router.management.get("/ready")).status_code == 200
        assert (await router.management.get("/status")).json()["draining"] is True
        router.router.management.advance(RouterEvent.DRAINED)
        assert (await router.management.get("/ready")).status_code == 503


async def test_a_router_has_started_once_it_has_a_worker(start_router: StartRouter, pusher) -> None:  # type: ignore[no-untyped-def]
    async with fake_workers(good) as (worker,), start_router() as router:
        probe = asyncio.create_task(router.management.get("/started", params={"wait": 60}))
        assert (await router.management.get("/ready")).status_code == 503
        assert not probe.done()
        await pusher(router, worker).heartbeat()
        answer = await probe
        assert (answer.status_code, answer.json()["ready"]) == (200, True)


async def test_a_router_without_workers_has_started_when_the_time_is_over(start_router: StartRouter) -> None:
    async with start_router() as router:
        answer = await router.management.get("/started", params={"wait": 0.01})
        assert (answer.status_code, answer.json()["reason"]) == (200, "no worker is known")
        assert (await router.management.get("/started", params={"wait": -1})).status_code == 422
        router.router.management.advance(RouterEvent.SIGTERM)
        answer = await router.management.get("/started", params={"wait": 60})
        assert answer.status_code == 200, "nobody waits for what is about to end"


async def test_explain_decides_and_sends_nothing(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as workers, start_router(workers, routing_strategy="cache_aware") as router:
        await router.complete(list(range(320)))
        received = [len(worker.received) for worker in workers]
        requests = [{"prompt": list(range(320))}, {"messages": [{"role": "user", "content": "hi"}]}]
        matched, chat = [(await router.management.post("/route/explain", json=body)).json() for body in requests]
        assert matched["decision"]["reason"] == "prefix_match"
        assert matched["decision"]["matched_blocks"] == 19
        assert matched["decision"]["prompt_tokens"] == 320
        assert {candidate["worker"] for candidate in matched["candidates"]} == {worker.url for worker in workers}
        chosen = min(matched["candidates"], key=lambda candidate: candidate["cost"])
        assert chosen["worker"] == matched["decision"]["worker_id"]
        expected = {
            "matched_blocks",
            "loaded_blocks",
            "load_seconds",
            "queue_seconds",
            "prefill_seconds",
            "cost",
            "in_flight",
        }
        assert all(expected <= set(candidate) for candidate in matched["candidates"])
        assert chat["decision"]["prompt_tokens"] > 0
        for body, path in (({"messages": requests[1]["messages"]}, "/v1/messages"), ({"input": "hi"}, None)):
            same = await router.management.post("/route/explain", json=body, params={"path": path} if path else {})
            assert same.json()["decision"]["prompt_tokens"] == chat["decision"]["prompt_tokens"]
        assert (await router.management.post("/route/explain?path=/v1/models", json=requests[0])).status_code == 400
        assert [len(worker.received) for worker in workers] == received
        assert router.metric("decisions_total", reason="prefix_match") == 0


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
async def test_explain_splits_each_cost_and_says_who_holds_which_blocks(
    start_router: StartRouter,
    pusher,
    tokenizer: Tokenizer,
    streaming: bool,  # type: ignore[no-untyped-def]
) -> None:
    text = "".join(f" word{number}" for number in range(60))
    tokens = tokenizer.encode(text)
    keys = block_keys(tokens, 16)
    async with (
        fake_workers(good, good, good) as workers,
        start_router(routing_strategy="cache_aware", ready=0) as router,
    ):
        for number, (worker, held) in enumerate(zip(workers, (3, 0, 5), strict=True)):
            push = pusher(router, worker)
            push.info = replace(push.info, worker_id=f"w{number}")
            await push.heartbeat(seq=3)
            blocks = tuple((key, keys[at - 1] if at else None) for at, key in enumerate(keys[:held]))
            assert (await push.sync(blocks=blocks)).status_code == 200
        body = {"prompt": text, "stream": streaming, "max_tokens": 8}
        page = (await router.management.post("/route/explain", json=body)).json()
        for candidate in page["candidates"]:
            parts = candidate["cost_parts"]
            assert sum(parts.values()) == pytest.approx(candidate["cost"])
            assert parts["prefill"] == candidate["prefill_seconds"]
            assert (parts["decode"] > 0) is not streaming
        charged = {candidate["worker"]: candidate["cost_parts"]["charge"] for candidate in page["candidates"]}
        assert charged["w2"] == 0 < charged["w0"] < charged["w1"]
        blocks = page["blocks"]
        last = -(-len(tokens) // 16)
        assert blocks["runs"] == [
            {"from": 0, "to": 3, "workers": ["w0", "w2"], "holders": 2},
            {"from": 3, "to": 5, "workers": ["w2"], "holders": 1},
            {"from": 5, "to": last, "workers": [], "holders": 0},
        ]
        assert len(blocks["texts"]) == last
        assert "".join(blocks["texts"]) == text


async def test_a_worker_may_leave_while_a_prompt_is_explained(
    start_router: StartRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_workers(good, good) as workers, start_router(workers) as router:
        loop, fleet = asyncio.get_running_loop(), router.router.fleet

        async def leave() -> None:
            fleet.remove(workers[0].url)

        def slow(*of: object) -> None:  # in a thread
            asyncio.run_coroutine_threadsafe(leave(), loop).result()

        monkeypatch.setattr(management, "block_texts", slow)
        answer = await router.management.post("/route/explain", json={"prompt": "x"})
        assert len(answer.json()["candidates"]) == 2


async def test_the_pages_name_the_tiers_of_blocks(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router() as router:
        pusher = Pusher(router, workers[0].url, router.router.fleet.config.fingerprint)
        tiers = {"tier_seconds": {Tier.CPU: 0.001, Tier.DISK: 0.01}}
        await pusher.heartbeat(**tiers)
        copies = (HeldElsewhere(Tier.CPU, 0, tuple(KEYS[5:8])),)
        snapshot = Snapshot(replace(pusher.info, **tiers), 3, LOAD, BLOCKS, copies)
        assert (await pusher.post("/internal/sync", encode_snapshot(snapshot))).status_code == 200
        (worker,) = (await router.management.get("/workers")).json()["workers"]
        assert (worker["blocks"], worker["slower_blocks"]) == (5, {"cpu": 3, "disk": 0})
        page = (await router.management.post("/route/explain", json={"prompt": list(range(320))})).json()
        assert page["decision"]["matched_blocks"] == 8
        assert page["decision"]["loaded_blocks"] == page["candidates"][0]["loaded_blocks"] == {"cpu": 3}
        assert page["candidates"][0]["load_seconds"] == pytest.approx(0.003)


@pytest.mark.parametrize(
    "body", [pytest.param(b"", id="empty"), pytest.param(b"{", id="half an object"), pytest.param(b"[]", id="list")]
)
async def test_explain_needs_a_request(start_router: StartRouter, body: bytes) -> None:
    async with start_router() as router:
        assert (await router.management.post("/route/explain", content=body)).status_code == 400


async def test_explain_without_workers(start_router: StartRouter) -> None:
    async with start_router() as router:
        response = await router.management.post("/route/explain", json={"prompt": "x"})
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "ServiceUnavailableError"


async def test_the_two_ports_do_not_serve_each_other(start_router: StartRouter) -> None:
    async with start_router() as router:
        assert (await router.management.post("/v1/completions", json={})).status_code == 404
        assert (await router.client.get("/workers")).status_code == 404


# --- GET /status ---


CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]


async def test_a_router_that_has_done_nothing(start_router: StartRouter) -> None:
    async with start_router() as router:
        assert (await router.management.get("/status")).json() == {
            "strategy": "round_robin",
            "draining": False,
            "workers": {"known": 0, "ready": 0, "matching": 0},
            "history_workers": 0,
            "ranks": {"known": 0, "ready": 0, "matching": 0},
            "view_age_seconds": None,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "decisions": {},
            "recent": [],
            "discovery": {"source": "static", "healthy": True, "age_seconds": None, "error": ""},
            "tokenizer": {
                "name": "gpt2",
                "state": "loaded",
                "fingerprint": load_tokenizer("gpt2").fingerprint,
                "error": "",
            },
            "tokenizers": {},
            "models": [],
            "reuse_score": {},
        }


async def test_what_was_decided_and_what_it_brought(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as workers:
        for worker in workers:
            worker.serve_feed(tokenizer.fingerprint)
        workers[0].blocks = CHAIN[:10]
        async with start_router(workers, routing_strategy="cache_aware") as router:
            await until(lambda: all(len(worker.feeds) == 1 for worker in workers))
            await router.complete(list(range(320)))
            await router.stream(list(range(160)))
            await router.complete([7] * 20)
            page = (await router.management.get("/status")).json()
            assert page["strategy"] == "cache_aware"
            assert page["workers"] == {"known": 2, "ready": 2, "matching": 2}
            assert page["view_age_seconds"] >= 0.0
            assert (page["prompt_tokens"], page["cached_tokens"]) == (300, 48), "as the answers have it"
            assert page["prompt_tokens"] == router.metric("reported_prompt_tokens_total")
            assert page["decisions"] == {"prefix_match": 2, "no_match": 1}
            newest, *_, oldest = page["recent"]
            assert (newest["reason"], oldest["reason"]) == ("no_match", "prefix_match")
            assert (oldest["worker_id"], oldest["matched_blocks"], oldest["prompt_blocks"]) == ("w0", 10, 20)
            assert oldest["age_seconds"] >= newest["age_seconds"] >= 0.0
            assert oldest["predicted_ttft_seconds"] > 0.0
            assert page["reuse_score"] == {"w0": pytest.approx(19.0, rel=0.01), "w1": 0.0}
            router.router.management.advance(RouterEvent.SIGTERM)
            assert (await router.management.get("/status")).json()["draining"] is True


async def test_the_last_twenty_decisions_are_kept(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        for _ in range(25):
            await router.complete()
        page = (await router.management.get("/status")).json()
        assert len(page["recent"]) == 20
        assert sum(page["decisions"].values()) == 25


async def test_an_answer_that_reports_no_cached_tokens_counts_for_neither(start_router: StartRouter) -> None:
    async def silent(connection: Connection, request: Received) -> None:
        await connection.answer(200, b'{"choices":[],"usage":{"prompt_tokens":100}}')

    async with fake_workers(silent) as workers, start_router(workers) as router:
        await router.complete()
        page = (await router.management.get("/status")).json()
        assert (page["prompt_tokens"], page["cached_tokens"]) == (0, 0)


async def test_a_request_that_failed_warms_nobody(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async def failing(connection: Connection, request: Received) -> None:
        await connection.answer(500, b"{}")

    async with fake_workers(failing) as (worker,):
        worker.serve_feed(tokenizer.fingerprint, "w")
        worker.blocks = CHAIN
        async with start_router([worker], retry_attempts=1) as router:
            await until(lambda: len(worker.feeds) == 1)
            await asyncio.gather(*(router.complete(list(range(320))) for _ in range(3)))
            assert (await router.management.get("/status")).json()["reuse_score"] == {"w": 0.0}
