"""The agent's loops while the engine is absent or becomes another one, on virtual time: how often they try, that none
runs without pause, and that an engine that changes at any moment is followed.

Not covered: ZMQ's own reconnecting, because the sockets are fakes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq.asyncio

from runtime.sockets import listen
from tests.virtual import CountingLoop, run
from worker.agent import agent as module
from worker.agent import rank
from worker.agent.agent import Agent
from worker.agent.core.load import Scrape
from worker.agent.engine import Models
from worker.agent.prompts import Expected
from worker.agent.settings import Settings
from worker.agent.subscription import Message

MINUTE = 60.0


async def for_a_minute(loop: CountingLoop, port: int = 1) -> None:
    url = f"http://127.0.0.1:{port}"
    settings = Settings(host="127.0.0.1", engine_url=url, model="m", block_size=16, blocks=100, replay_endpoint="")
    agent = Agent(settings, lambda: Expected("-", ()), 1, clock=loop.time)
    task = asyncio.create_task(agent.run())
    await asyncio.sleep(MINUTE + 0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    agent.close()


class Well:
    """An engine that answers."""

    async def scrape(self) -> tuple[Scrape, ...]:
        return (Scrape("m", 0, 0, 0, 0.0, 16, 100, 0.0, 0.0),)

    async def models(self) -> Models:
        return Models((), {})


class Dropped:
    """Connections to a publisher that drops each at once."""

    made = 0

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, topic: str) -> None:
        type(self).made += 1

    async def connected(self) -> None:
        return None

    async def disconnected(self) -> None:
        return None

    async def receive(self, timeout: float) -> Message | None:
        await asyncio.sleep(timeout)
        return None

    def close(self) -> None:
        return None


class Held(Dropped):
    """A connection that lasts until `drop`."""

    drop: asyncio.Future[None]

    async def disconnected(self) -> None:
        await asyncio.shield(Held.drop)


@asynccontextmanager
async def client_of_one_that_answers(url: str) -> AsyncIterator[Well]:
    yield Well()


@pytest.mark.parametrize("turns", range(4))
def test_an_agent_that_is_stopped_while_a_connection_ends_stops(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    monkeypatch.setattr(module, "engine_client", client_of_one_that_answers)
    monkeypatch.setattr(rank, "Subscription", Held)

    async def main(loop: CountingLoop) -> None:
        Held.drop = loop.create_future()
        settings = Settings(host="127.0.0.1", model="m", block_size=16, blocks=100, replay_endpoint="")
        agent = Agent(settings, lambda: Expected("-", ()), 1, clock=loop.time)
        task = asyncio.create_task(agent.run())
        await asyncio.sleep(1)
        Held.drop.set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=MINUTE)
        assert task.cancelled()
        agent.close()

    run(main)


class Opening(Held):
    """Connections that are made once `opened` is set, and last."""

    opened: asyncio.Event

    async def connected(self) -> None:
        await Opening.opened.wait()


@asynccontextmanager
async def empty_replay(
    context: zmq.asyncio.Context, endpoint: str, start: int
) -> AsyncIterator[AsyncIterator[Message]]:
    async def answers() -> AsyncIterator[Message]:
        for _ in range(2):
            await asyncio.sleep(0)
        return
        yield

    yield answers()


@pytest.mark.parametrize("turns", range(12))
def test_an_engine_that_becomes_another_one_while_the_agent_connects_is_followed(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    async def main(loop: CountingLoop) -> None:
        changed, Opening.opened, Held.drop = asyncio.Event(), asyncio.Event(), loop.create_future()

        class Changing:
            scrapes = 0

            async def scrape(self) -> tuple[Scrape, ...]:
                self.scrapes += 1
                if self.scrapes > 1:
                    await changed.wait()
                return (Scrape("m", 0, 0, 0, 0.0, 16, 100 + changed.is_set(), 0.0, 0.0),)

            async def models(self) -> Models:
                return Models((), {})

        @asynccontextmanager
        async def client(url: str) -> AsyncIterator[Changing]:
            yield Changing()

        monkeypatch.setattr(module, "engine_client", client)
        monkeypatch.setattr(rank, "Subscription", Opening)
        monkeypatch.setattr(rank, "replay", empty_replay)
        settings = Settings(host="127.0.0.1", model="m", block_size=16)
        agent = Agent(settings, lambda: Expected("-", ()), 1, clock=loop.time)
        task = asyncio.create_task(agent.run())
        await asyncio.sleep(2)
        Opening.opened.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        changed.set()
        await asyncio.sleep(1)
        assert not task.done()
        assert agent.ranks[0].follow_state is rank.FollowState.FOLLOWING
        assert agent.ranks[0].view.state.info.capacity == 101
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        agent.close()

    run(main)


def test_a_publisher_that_drops_connections_is_asked_twice_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "engine_client", client_of_one_that_answers)
    monkeypatch.setattr(rank, "Subscription", Dropped)

    async def main(loop: CountingLoop) -> None:
        await for_a_minute(loop)
        assert MINUTE <= Dropped.made <= 2 * MINUTE + 1
        assert loop.iterations < 100 * MINUTE

    run(main)


def test_an_engine_that_refuses_connections_is_asked_once_a_second() -> None:
    closed = listen("127.0.0.1", 0)
    port = closed.getsockname()[1]
    closed.close()

    async def main(loop: CountingLoop) -> None:
        await for_a_minute(loop, port)
        assert loop.iterations < 100 * MINUTE

    run(main)
