"""A faulty connection between an engine's ZMQ sockets and an agent: batches are lost, spoilt, repeated or replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import zmq
import zmq.asyncio

from worker.kv_events import rank_endpoint

Message = tuple[int, bytes]
"""Sequence number and payload."""

END = b"\xff" * 8


def unchanged(message: Message) -> Iterable[Message]:
    return [message]


class Wire:
    """Forwards what an engine publishes, and the replays that an agent asks for.

    `fault` gets each live batch of rank 0 and returns what the agent gets in its place; the other ranks have no
    faults.
    """

    def __init__(self, folder: Path, events: str, replay: str, ranks: int = 1) -> None:
        self.events, self.replay = f"ipc://{folder}/wire-events:1", f"ipc://{folder}/wire-replay:1"
        self.fault: Callable[[Message], Iterable[Message]] = unchanged
        self.forgotten = 0
        """Batches of rank 0 before this one are not replayed."""
        self.asked: list[int] = []
        """Where each replay of rank 0 began."""
        self._upstream = events, replay
        self._ranks = ranks
        self._context = zmq.asyncio.Context(io_threads=1)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Wire]:
        tasks = [task for rank in range(self._ranks) for task in self._connect(rank)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._context.destroy(linger=0)

    def _connect(self, rank: int) -> list[asyncio.Task[None]]:
        subscribed, published = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        asked = self._context.socket(zmq.ROUTER)
        subscribed.subscribe(b"")
        events, replay = (rank_endpoint(endpoint, rank) for endpoint in self._upstream)
        subscribed.connect(events)
        published.bind(rank_endpoint(self.events, rank))
        asked.bind(rank_endpoint(self.replay, rank))
        return [
            asyncio.create_task(self._forward(subscribed, published, faulty=rank == 0)),
            asyncio.create_task(self._answer(asked, replay, faulty=rank == 0)),
        ]

    async def _forward(self, subscribed: zmq.asyncio.Socket, published: zmq.asyncio.Socket, *, faulty: bool) -> None:
        while True:
            topic, number, payload = await subscribed.recv_multipart()
            message = int.from_bytes(number, "big"), payload
            for seq, altered in self.fault(message) if faulty else unchanged(message):
                await published.send_multipart([topic, seq.to_bytes(8, "big"), altered])

    async def _answer(self, asked: zmq.asyncio.Socket, replay: str, *, faulty: bool) -> None:
        while True:
            identity, empty, start = await asked.recv_multipart()
            if faulty:
                self.asked.append(int.from_bytes(start, "big"))
            with self._context.socket(zmq.DEALER) as engine:
                engine.connect(replay)
                await engine.send_multipart([empty, start])
                while True:
                    frames = await engine.recv_multipart()
                    number = int.from_bytes(frames[-2], "big")
                    if frames[-2] == END or not faulty or number >= self.forgotten:
                        await asked.send_multipart([identity, *frames])
                    if frames[-2] == END:
                        break
