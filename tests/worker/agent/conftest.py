"""An agent in this process beside a fake engine, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from kvcache.feed import MSGPACK, Snapshot, decode_snapshot
from kvcache.keys import BlockKey
from tests.worker.agent.engine import FakeEngine
from tests.worker.conftest import Client
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings


@dataclass
class Running:
    agent: Agent
    client: Client

    async def snapshot(self) -> Snapshot:
        reply = await self.client.get("/cache/state", {"accept": MSGPACK})
        assert reply.status == 200, reply.text
        return decode_snapshot(reply.body, MSGPACK)

    async def keys(self) -> Counter[BlockKey]:
        return Counter(key for key, _ in (await self.snapshot()).blocks)

    async def health(self) -> tuple[int, str]:
        reply = await self.client.get("/health")
        return reply.status, reply.text

    async def metric(self, name: str, **labels: str) -> float:
        wanted = ",".join(f'{label}="{value}"' for label, value in labels.items())
        line = f"kvcluster_agent_{name}{{{wanted}}} " if wanted else f"kvcluster_agent_{name} "
        text = (await self.client.get("/metrics")).text
        return float(next(each for each in text.splitlines() if each.startswith(line)).rpartition(" ")[2])


NOTHING_EXPECTED = partial(Expected, "f" * 32, ())
"""A tokenizer of which only the fingerprint is known."""

Start = Callable[..., contextlib.AbstractAsyncContextManager[Running]]


@pytest.fixture
def beside() -> Start:
    @contextlib.asynccontextmanager
    async def start(
        engine: FakeEngine, *, expected: Callable[[], Expected] = NOTHING_EXPECTED, **settings: Any
    ) -> AsyncIterator[Running]:
        chosen = Settings(
            **{
                "engine_url": engine.url,
                "events_endpoint": engine.events_endpoint,
                "replay_endpoint": engine.replay_endpoint,
                "worker_id": "w",
                "poll_interval": 0.05,
                **settings,
            }
        )
        agent = Agent(chosen, expected, 8101, time.monotonic)
        task = asyncio.create_task(agent.run())
        try:
            yield Running(agent, Client(App(agent)))
        finally:
            agent.stop_serving()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            agent.close()

    return start
