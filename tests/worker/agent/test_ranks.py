"""An agent that follows all data-parallel ranks of an engine: an emulated worker that publishes vLLM's KV events over
ZMQ, a port for each rank, in this process.

Covers: the view of each rank, ranks that come and go with a restart, engines whose first rank is not 0, and a number of
ranks that is not the expected one. Compared with a vLLM of two ranks: docs/vllm.md. Not covered: the events themselves
(test_agent.py) and routers (tests/router/test_ranks.py).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from starlette.types import Receive, Scope, Send

from kvcache.feed import Snapshot, decode_snapshot
from kvcache.tokens.tokenizer import Tokenizer
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.processes import eventually, free_port
from tests.worker.agent.conftest import NOTHING_EXPECTED
from tests.worker.conftest import Client
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.settings import Settings
from worker.emulator.generators import make_generator
from worker.kv_events import KVEventsConfig, rank_endpoint
from worker.main import Worker
from worker.settings import Settings as WorkerSettings

pytestmark = pytest.mark.looptime(False)

HEADER = "X-data-parallel-rank"


def following_ports(number: int) -> int:
    """The first of so many free ports in a row."""
    ports: list[int] = []
    while len(ports) < number:
        ports.append(free_port())
        if ports[-1] != ports[0] + len(ports) - 1:
            ports = ports[-1:]
    return ports[0]


class Engine:
    """The API of a worker whose metrics name only the engines that `shown` has (None: all)."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.shown: set[int] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/metrics" or self.shown is None:
            await self.worker.app(scope, receive, send)
            return
        lines = (await Client(self.worker.app).get("/metrics")).text.splitlines(keepends=True)
        named = [re.search(r'engine="(\d+)"', line) for line in lines]
        kept = [line for line, name in zip(lines, named, strict=True) if name is None or int(name[1]) in self.shown]
        body = "".join(kept).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Beside:
    """A worker and the agent beside it."""

    agent: Agent
    client: Client
    engine: Engine

    @property
    def worker(self) -> Worker:
        return self.engine.worker

    async def ask(self, rank: int, tokens: range) -> None:
        body = {"prompt": list(tokens), "max_tokens": 1}
        assert (await Client(self.worker.app).post("/v1/completions", body, {HEADER: str(rank)})).status == 200

    async def snapshot(self, rank: int) -> Snapshot:
        reply = await self.client.get(f"/cache/state?rank={rank}")
        assert reply.status == 200, reply.text
        return decode_snapshot(reply.body)

    async def agrees(self, rank: int) -> None:
        """The agent's view of the rank is what its engine holds."""
        held = Counter(key for key, _ in self.worker.ranks[rank].engine.blocks())

        async def same() -> bool:
            return Counter(key for key, _ in (await self.snapshot(rank)).blocks) == held

        await eventually(same, f"the view of rank {rank} is what its engine holds")


@asynccontextmanager
async def beside(tokenizer: Tokenizer, ranks: int, **settings: object) -> AsyncIterator[Beside]:
    events, replay = following_ports(4), following_ports(4)
    config = KVEventsConfig(endpoint=f"tcp://*:{events}", replay_endpoint=f"tcp://127.0.0.1:{replay}")
    chosen = WorkerSettings(model="m", kv_events="zmq", kv_events_config=config, data_parallel_size=ranks, speed=100)
    generator = make_generator("sampler", tokenizer, seed=0, mean_tokens=8)
    sock = listen("127.0.0.1", 0)
    worker = Worker(chosen, tokenizer, generator, sock.getsockname()[1])
    engine = Engine(worker)
    server = HttpServer(engine, sock)
    await server.start()
    agent = Agent(
        Settings(
            engine_url=f"http://127.0.0.1:{server.port}",
            events_endpoint=f"tcp://127.0.0.1:{events}",
            replay_endpoint=f"tcp://127.0.0.1:{replay}",
            worker_id="pod",
            poll_interval=0.05,
            **settings,  # type: ignore[arg-type]
        ),
        NOTHING_EXPECTED,
        8101,
        time.monotonic,
    )
    task = asyncio.create_task(agent.run())
    try:
        yield Beside(agent, Client(App(agent)), engine)
    finally:
        agent.stop_serving()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        agent.close()
        await server.stop(0)
        worker.close()


async def test_each_rank_has_a_feed_of_its_own(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 2) as run:
        await run.ask(1, range(1, 100))  # before the agent follows: it asks for what it missed
        await eventually(lambda: not run.agent.problem, "the agent follows")
        assert len(run.agent.ranks) == 2
        for rank, start in itertools.product(range(2), (1000, 2000)):
            await run.ask(rank, range(start, start + 100 + 50 * rank))
        for rank, blocks in enumerate((12, 24)):
            await run.agrees(rank)
            info = (snapshot := await run.snapshot(rank)).info
            assert len(snapshot.blocks) == blocks
            assert (info.worker_id, info.rank, info.ranks) == (f"pod/{rank}", rank, 2)
            assert info.capacity == run.worker.ranks[rank].engine.config.blocks
        assert (await run.client.get("/cache/state?rank=2")).status == 404
        text = (await run.client.get("/metrics")).text
        assert "kvcluster_agent_ranks 2.0" in text
        assert "kvcluster_agent_blocks 36.0" in text


async def test_a_number_of_ranks_that_is_not_the_expected_one(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 2, data_parallel_size=3) as run:
        await eventually(lambda: "there are 3" in run.agent.problem, "the agent has asked")
        reply = await run.client.get("/cache/state")
        assert (reply.status, "AGENT_DATA_PARALLEL_SIZE" in reply.text) == (503, True)


async def test_ranks_come_and_go_with_the_engine(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 3) as run:
        await eventually(lambda: not run.agent.problem, "the agent follows three ranks")
        first = [rank.view.feed.epoch for rank in run.agent.ranks]
        run.engine.shown = {0}
        await eventually(lambda: len(run.agent.ranks) == 1 and not run.agent.problem, "one is left")
        (rank,) = run.agent.ranks
        assert (rank.view.state.info.worker_id, rank.view.state.info.ranks) == ("pod", 1)
        assert rank.view.feed.epoch > first[0]
        run.engine.shown = None
        await eventually(lambda: len(run.agent.ranks) == 3 and not run.agent.problem, "all are back")
        await run.ask(2, range(1, 100))
        await run.agrees(2)


async def test_an_engine_that_is_not_the_first_of_its_deployment(tokenizer: Tokenizer) -> None:
    """A server of vLLM's external load balancing: one engine, whose number its ports follow."""
    async with beside(tokenizer, 3) as run:
        run.engine.shown = {2}
        await eventually(lambda: len(run.agent.ranks) == 1 and not run.agent.problem, "the agent follows")
        await run.ask(0, range(1, 100))
        await run.ask(2, range(1000, 1100))
        held = Counter(key for key, _ in run.worker.ranks[2].engine.blocks())
        await eventually(
            lambda: Counter(key for key, _ in run.agent.ranks[0].view.blocks()) == held, "it is that engine's view"
        )


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://127.0.0.1:5557", 3, "tcp://127.0.0.1:5560"),
        ("tcp://[::1]:5557", 1, "tcp://[::1]:5558"),
        ("tcp://*:0", 3, "tcp://*:0"),
        ("inproc://cache", 2, "inproc://cache_dp2"),
        ("ipc:///tmp/cache", 2, "ipc:///tmp/cache"),
    ],
)
def test_the_endpoint_of_a_rank(endpoint: str, rank: int, expected: str) -> None:
    assert rank_endpoint(endpoint, 0) == endpoint
    assert rank_endpoint(endpoint, rank) == expected
