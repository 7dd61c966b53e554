"""The engine's ZMQ sockets: a subscription that ends with its connection, and the replay of missed batches."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from uuid import uuid4

import zmq
import zmq.asyncio

HIGH_WATER_MARK = 100_000
"""Batches that may wait in the socket, as many as in vLLM's publisher. Beyond that ZMQ drops some, which shows as a
gap."""

REPLAY_TIMEOUT = 2.0
"""Seconds between two messages of a replay after which it has failed. vLLM handles replay requests every 0.1 s."""

HEARTBEAT = 1_000
HEARTBEAT_TIMEOUT = 3_000
"""Milliseconds between heartbeats, and after which an engine that does not answer them counts as disconnected."""

FIRST_RECONNECT = 100
LONGEST_RECONNECT = 2_000
"""Milliseconds between attempts to reach an absent publisher, doubled from the first to the longest. Without a longest,
ZMQ would try ten times a second for as long as the engine loads its model."""

_EVENT = struct.Struct("=HI")
"""A message of ZMQ's socket monitor: the event's number, and a value whose meaning depends on the event."""

_END = b"\xff" * 8

Message = tuple[int, bytes]
"""Sequence number and payload."""


class ReplayError(Exception):
    """The engine does not answer replay requests."""


class Subscription:
    """One connection to the publisher. It ends with that connection, although ZMQ would reconnect by itself, because
    the agent must notice that the engine may have restarted."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, topic: str) -> None:
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT)
        self._socket.setsockopt(zmq.RECONNECT_IVL, FIRST_RECONNECT)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, LONGEST_RECONNECT)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        # The name is unique: pyzmq would derive it from the file descriptor, which a later socket may reuse.
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED, f"inproc://{uuid4()}"
        )
        self._socket.connect(endpoint)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._socket.close(0)

    async def connected(self) -> None:
        """Return once the publisher has completed the handshake: everything that it publishes from now on arrives."""
        while await self._event() != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            pass

    async def disconnected(self) -> None:
        """Return when the connection is lost: the publisher's process ended, or did not run for seconds."""
        while await self._event() != zmq.EVENT_DISCONNECTED:
            pass

    async def receive(self, timeout: float) -> Message | None:
        """The next batch, or None after `timeout` seconds without one. Messages that are no batches are skipped."""
        while await self._socket.poll(int(timeout * 1000)):
            message = _message(await self._socket.recv_multipart())
            if message is not None:
                return message
        return None

    async def _event(self) -> int:
        frames: list[bytes] = await self._monitor.recv_multipart()
        number, _ = _EVENT.unpack_from(frames[0])
        return int(number)


@contextlib.asynccontextmanager
async def replay(context: zmq.asyncio.Context, endpoint: str, start: int) -> AsyncIterator[AsyncIterator[Message]]:
    """Ask for every batch from number `start` on. The iterator ends when the engine says so, and raises `ReplayError`.

    Each request has a socket of its own, so that a late answer to an earlier request cannot be mistaken for this one's.
    """
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.connect(endpoint)
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        yield _answers(socket)
    finally:
        socket.close(0)


async def _answers(socket: zmq.asyncio.Socket) -> AsyncIterator[Message]:
    while await socket.poll(int(REPLAY_TIMEOUT * 1000)):
        frames = await socket.recv_multipart()
        if len(frames) >= 2 and frames[-2] == _END:
            return
        if (message := _message(frames)) is not None:
            yield message
    raise ReplayError


def _message(frames: list[bytes]) -> Message | None:
    """The message of these frames. The last two are number and payload; old replay answers have no topic before
    them."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big"), frames[-1]
