"""An emulated worker that publishes vLLM's KV events over ZMQ, and the agent beside it, in this process."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

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
from worker.kv_events import KVEventsConfig
from worker.main import Worker
from worker.settings import Settings as WorkerSettings

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
        engine = self.worker.ranks[rank].engine
        held = Counter(key for key, _ in engine.blocks())
        elsewhere = {(copies.tier, copies.group): Counter(copies.keys) for copies in engine.elsewhere()}

        async def same() -> bool:
            seen = await self.snapshot(rank)
            copies = {(part.tier, part.group): Counter(part.keys) for part in seen.elsewhere}
            return Counter(key for key, _ in seen.blocks) == held and copies == elsewhere

        await eventually(same, f"the view of rank {rank} is what its engine holds")


@asynccontextmanager
async def beside(
    tokenizer: Tokenizer, ranks: int, worker_settings: dict[str, Any] | None = None, **settings: object
) -> AsyncIterator[Beside]:
    """`settings` are those of the agent."""
    events, replay = following_ports(4), following_ports(4)
    config = KVEventsConfig(endpoint=f"tcp://*:{events}", replay_endpoint=f"tcp://127.0.0.1:{replay}")
    given: dict[str, Any] = {"data_parallel_size": ranks, "speed": 100} | (worker_settings or {})
    chosen = WorkerSettings(model="m", kv_events="zmq", kv_events_config=config, **given)
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
