"""GET /status, and what it is made of."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.server.management import RouterEvent
from tests.router.conftest import StartRouter, until
from tests.router.fakes import Connection, Received, fake_workers, good

KEYS = block_keys(range(320), 16)
CHAIN = [(key, KEYS[at - 1] if at else None) for at, key in enumerate(KEYS)]


async def test_a_router_that_has_done_nothing(start_router: StartRouter) -> None:
    async with start_router() as router:
        assert (await router.management.get("/status")).json() == {
            "strategy": "round_robin",
            "draining": False,
            "workers": {"known": 0, "ready": 0, "matching": 0},
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
