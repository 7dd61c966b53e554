"""A router that reads a cache agent's feed: its view is the engine's cache, through gaps, losses and restarts.

The engine is a stand-in that publishes captured events of a vLLM on real ZMQ sockets.

Not covered: requests and decisions (the view alone is compared), the agent's own rules (tests/worker/agent), a
running vLLM (tests/real_vllm).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from kvcache.keys import BlockKey
from kvcache.profiles import DEFAULT_PROFILE, profile
from router.core.fleet import Fleet, FleetConfig
from router.metrics import Metrics
from router.sync.subscriber import Subscriber
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.processes import eventually
from tests.worker.agent.captures import cached, messages
from tests.worker.agent.engine import FakeEngine, payloads
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings

pytestmark = pytest.mark.process

FINGERPRINT = "f" * 32


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as one:
        yield one


@pytest.fixture
async def agent_url(engine: FakeEngine) -> AsyncIterator[str]:
    settings = Settings(
        engine_url=engine.url,
        events_endpoint=engine.events_endpoint,
        replay_endpoint=engine.replay_endpoint,
        poll_interval=0.05,
    )
    sock = listen("127.0.0.1", 0)
    agent = Agent(settings, lambda: Expected(FINGERPRINT, ()), sock.getsockname()[1])
    server = HttpServer(App(agent), sock, cancel_on_disconnect=True)
    await server.start()
    task = asyncio.create_task(agent.run())
    yield f"http://127.0.0.1:{server.port}"
    agent.stop_serving()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop(0)
    agent.close()


async def test_the_routers_view_is_the_engines_cache(engine: FakeEngine, agent_url: str) -> None:
    captured, other = messages("kv_events_small"), messages("kv_events_cbor_bytes")
    quarter = len(captured) // 4
    latency = profile(DEFAULT_PROFILE).latency
    fleet = Fleet(FleetConfig(block_size=16, fingerprint=FINGERPRINT, latency=latency, model="tiny"))
    fleet.add(engine.url, feed_proves_liveness=False)

    async def sees(expected: Counter[BlockKey]) -> None:
        await eventually(lambda: Counter(fleet.held_blocks(engine.url)) == expected, "the view is the cache")

    async with aiohttp.ClientSession() as session:
        subscriber = Subscriber(
            engine.url,
            fleet,
            session,
            Metrics(CollectorRegistry()),
            clock=time.monotonic,
            rng=random.Random(1),
            on_connected=lambda: None,
            on_refused=lambda why: None,
            feed=agent_url,
        )
        following = asyncio.create_task(subscriber.run())
        try:
            await engine.publish(*payloads(captured[:quarter]))
            await sees(cached(captured[:quarter]))
            engine.lose(*payloads(captured[quarter : 2 * quarter]))
            await engine.publish(*payloads(captured[2 * quarter : 3 * quarter]))
            await sees(cached(captured[: 3 * quarter]))
            await engine.stop()
            await engine.start()
            await engine.publish(*payloads(other))
            await sees(cached(other))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
