"""A faulty connection between an engine's ZMQ sockets and an agent: batches are lost, spoilt, repeated or replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import zmq
import zmq.asyncio

Message = tuple[int, bytes]
"""Sequence number and payload."""

END = b"\xff" * 8


def unchanged(message: Message) -> Iterable[Message]:
    return [message]


class Wire:
    """Forwards what an engine publishes, and the replays that an agent asks for.

    `fault` gets each live batch and returns what the agent gets in its place.
    """

    def __init__(self, folder: Path, events: str, replay: str) -> None:
        self.events, self.replay = f"ipc://{folder}/wire-events", f"ipc://{folder}/wire-replay"
        self.fault: Callable[[Message], Iterable[Message]] = unchanged
        self.forgotten = 0
        """Batches before this one are not replayed."""
        self.asked: list[int] = []
        """Where each replay began."""
        self._upstream = events, replay
        self._context = zmq.asyncio.Context(io_threads=1)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Wire]:
        subscribed, published = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        asked = self._context.socket(zmq.ROUTER)
        subscribed.subscribe(b"")
        subscribed.connect(self._upstream[0])
        published.bind(self.events)
        asked.bind(self.replay)
        tasks = [
            asyncio.create_task(self._forward(subscribed, published)),
            asyncio.create_task(self._answer(asked)),
        ]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._context.destroy(linger=0)

    async def _forward(self, subscribed: zmq.asyncio.Socket, published: zmq.asyncio.Socket) -> None:
        while True:
            topic, number, payload = await subscribed.recv_multipart()
            for seq, altered in self.fault((int.from_bytes(number, "big"), payload)):
                await published.send_multipart([topic, seq.to_bytes(8, "big"), altered])

    async def _answer(self, asked: zmq.asyncio.Socket) -> None:
        while True:
            identity, empty, start = await asked.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            with self._context.socket(zmq.DEALER) as engine:
                engine.connect(self._upstream[1])
                await engine.send_multipart([empty, start])
                while True:
                    frames = await engine.recv_multipart()
                    number = int.from_bytes(frames[-2], "big")
                    if frames[-2] == END or number >= self.forgotten:
                        await asked.send_multipart([identity, *frames])
                    if frames[-2] == END:
                        break
