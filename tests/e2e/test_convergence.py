"""After random traffic with cancellations, at rest: the index equals the workers' caches, and no request or block is
held.

Not covered: failures (test_failures.py), chats, several routers, and workers whose feed an agent publishes.
"""

from __future__ import annotations

import asyncio
import random

import aiohttp
import orjson
import pytest

from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

REQUESTS = 5_000
CLIENTS = 48


def _body(rng: random.Random) -> bytes:
    """A prompt that shares its start with others at several depths, as token ids."""
    tokens: list[int] = []
    for depth in range(rng.randint(1, 6)):
        choice = rng.randrange(2 + depth)
        tokens += [depth * 1000 + choice] * rng.randint(12, 40 if rng.random() < 0.2 else 20)
    return orjson.dumps(
        {
            "prompt": tokens,
            "max_tokens": rng.choice((1, 2, 8, 24)),
            "stream": rng.random() < 0.5,
            "ignore_eos": rng.random() < 0.5,
            "n": 2 if rng.random() < 0.05 else 1,
            **({"cache_salt": "tenant"} if rng.random() < 0.1 else {}),
        }
    )


async def test_thousands_of_random_requests_with_cancellations_leave_nothing_behind(start_cluster):
    rng = random.Random(7)
    # A cache of 260 blocks: evictions, queueing and preemptions all the time.
    async with (
        start_cluster(workers=3, speed=100, blocks=260) as cluster,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), headers={"content-type": "application/json"}
        ) as session,
    ):
        statuses: dict[int | str, int] = {}

        def count(outcome: int | str) -> None:
            statuses[outcome] = statuses.get(outcome, 0) + 1

        async def one(body: bytes, patience: float | None) -> None:
            try:
                async with asyncio.timeout(patience):
                    async with session.post(f"{cluster.url}/v1/completions", data=body) as answer:
                        await answer.read()
                        count(answer.status)
            except TimeoutError:
                count("cancelled")

        async def client(number: int) -> None:
            for _ in range(number):
                await one(_body(rng), rng.random() * 0.08 if rng.random() < 0.15 else None)

        await asyncio.gather(*(client(REQUESTS // CLIENTS + 1) for _ in range(CLIENTS)))
        assert set(statuses) <= {200, "cancelled"}, statuses
        assert statuses["cancelled"] > REQUESTS // 100
        assert statuses[200] > REQUESTS // 2

        async def at_rest() -> bool:
            return (
                all(worker["in_flight"] == 0 for worker in await cluster.router_workers())
                and await cluster.views_agree()
            )

        await eventually(at_rest, "no request in flight and every view equal to its worker's state", 30)
        for worker in cluster.local.workers:
            assert await cluster.metric(worker.url, "vllm:num_requests_running") == 0
            assert await cluster.metric(worker.url, "vllm:num_requests_waiting") == 0
            assert await cluster.metric(worker.url, "vllm:kv_cache_usage_perc") == 0, "a block is still referenced"
            state = (await cluster.client.get(f"{worker.url}/cache/state")).json()
            assert state["load"]["free_blocks"] == state["load"]["total_blocks"] == 260
            assert state["blocks"], "the test means nothing with empty caches"
