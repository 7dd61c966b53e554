"""Publishes KV events over ZMQ as vLLM does: a PUB socket, and a ROUTER socket that replays the last batches.

Not modelled: vLLM's queue between scheduler and publisher (`max_queue_size`); a batch goes to the socket at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from runtime.logs import EventLogger
from worker.emulator.engine.events import CacheCleared, CacheEvent
from worker.emulator.kv_events.encoding import VllmEvents
from worker.kv_events import EndpointError, KVEventsConfig

logger = EventLogger(__name__)

END_SEQ = (-1).to_bytes(8, "big", signed=True)
"""Number of the message that ends a replay."""


class KVEventsPublisher:
    """Publishes the batches of one engine, one for each step that changed its cache.

    vLLM publishes what a step changed when the step ends. A reset of the cache between two steps therefore waits for
    the end of the next one, however late that is. Copies to the CPU do not: an engine that has nothing else to do goes
    on stepping until they are made. `now` gives seconds since 1970.

    Must be made inside the event loop. Raises `EndpointError`.
    """

    def __init__(self, config: KVEventsConfig, events: VllmEvents, now: Callable[[], float], rank: int = 0) -> None:
        config = config.of_rank(rank)
        self._events = events
        self._now = now
        self._rank = rank
        self._topic = config.topic.encode()
        self._seq = 0
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._held: list[CacheEvent] = []
        self._due = 0
        """The step at whose end they are published, counted from 1."""
        self._begun = 0
        self._context = zmq.Context[zmq.Socket[bytes]](io_threads=1)
        self._publishing = self._context.socket(zmq.PUB)
        self._publishing.set_hwm(config.hwm)
        self._router = zmq.asyncio.Socket(self._context, zmq.ROUTER)
        self._replaying: asyncio.Task[None] | None = None
        try:
            if _is_bound(config.endpoint):
                self._publishing.bind(config.endpoint)
            else:
                self._publishing.connect(config.endpoint)
            if config.replay_endpoint is not None:
                self._router.bind(config.replay_endpoint)
                self._replaying = asyncio.create_task(self._serve_replays())
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"--kv-events-config: {config.endpoint}, {config.replay_endpoint}: {error}") from None
        self.config = config

    @property
    def published(self) -> int:
        """How many batches were published: the number of the next one."""
        return self._seq

    def take(self, events: Sequence[CacheEvent], begun: int, ended: int) -> None:
        """Take the engine's latest changes. `begun` and `ended`: how many steps have."""
        if self._held and ended >= self._due:
            self._publish()
        if events:
            idle = begun == ended == self._begun
            self._due = begun + (idle and CacheCleared() in events)
            self._held += events
            if ended >= self._due:
                self._publish()
        self._begun = begun

    def close(self) -> None:
        """Close the sockets. What is held is lost, as in vLLM."""
        if self._replaying is not None:
            self._replaying.cancel()
        self._router.close(linger=0)
        self._context.destroy(linger=0)

    def _publish(self) -> None:
        payload = self._events.payload(self._held, self._now(), self._rank)
        self._held = []
        number = self._seq.to_bytes(8, "big")
        self._seq += 1
        self._publishing.send_multipart((self._topic, number, payload))
        self._buffer.append((number, payload))

    async def _serve_replays(self) -> None:
        router = self._router
        while True:
            request = await router.recv_multipart()
            if len(request) != 3:
                logger.warning("invalid_replay_request", frames=len(request))
                continue
            client, _, start = request
            for number, payload in tuple(self._buffer):
                if int.from_bytes(number, "big") >= int.from_bytes(start, "big"):
                    await router.send_multipart((client, b"", self._topic, number, payload))
            await router.send_multipart((client, b"", b"", END_SEQ, b""))


def _is_bound(endpoint: str) -> bool:
    """vLLM binds endpoints with a wildcard and connects to others."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
