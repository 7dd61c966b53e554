"""A fake vLLM whose sockets and protocols are real. Tests decide what it publishes and answers.

Not modelled: blocks, hashes and generation; a test publishes whatever events it wants.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import zmq
import zmq.asyncio
from starlette.types import Receive, Scope, Send

from runtime.http.server import HttpLimits, HttpServer
from runtime.sockets import listen

END = b"\xff" * 8

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="tiny"} %(running)s
vllm:num_requests_waiting{engine="0",model_name="tiny"} %(waiting)s
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} %(usage)s
vllm:request_prompt_tokens_count{engine="0",model_name="tiny"} 4.0
vllm:request_prompt_tokens_sum{engine="0",model_name="tiny"} 400.0
vllm:cache_config_info{block_size="%(block_size)s",engine="0",num_gpu_blocks="%(blocks)s"} 1.0
"""


def packed(*events: dict[str, Any]) -> bytes:
    """A batch's payload."""
    payload: bytes = msgpack.packb([0.5, list(events), 0])
    return payload


def stored(names: list[int], tokens: list[int], parent: int | None = None, **fields: Any) -> dict[str, Any]:
    size = len(tokens) // len(names)
    event = {"type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens}
    return {**event, "block_size": size, "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


def removed(*names: int, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": "GPU", **fields}


CLEARED = {"type": "AllBlocksCleared"}


class FakeEngine:
    """PUB, replay ROUTER, /health, /metrics and /tokenize on loopback. `stop` and `start` are a restart: numbers begin
    again. `/tokenize` answers what the test says: statuses and the form of the answer are those of vLLM 0.32 (200 with
    `tokens`, 400 for what it refuses, 404 where it is not served)."""

    def __init__(self, *, buffer: int = 10_000, topics_in_replay: bool = True, replays: bool = True) -> None:
        self._context = zmq.asyncio.Context()
        self._http = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._http.getsockname()[1]}"
        self._topics_in_replay = topics_in_replay
        self._replays = replays
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._next = 0
        self._ports: dict[str, int] = {}
        self._pub: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._server = HttpServer(self._app, self._http, HttpLimits())
        self.asked: list[int] = []
        """Where each replay request began."""
        self.holes: set[int] = set()
        """Batches that the next answers lose, each once."""
        self.health = 200
        self.answers = asyncio.Event()
        """While cleared, HTTP requests wait."""
        self.answers.set()
        self.tokenize: Callable[[dict[str, Any]], list[int] | int] = lambda body: 404
        """Token ids of a body, or the status of the refusal."""
        self.values: dict[str, Any] = {"running": 0, "waiting": 0, "usage": 0.0, "block_size": 16, "blocks": 101}

    @property
    def events_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self._ports['pub']}"

    @property
    def replay_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self._ports['replay']}"

    async def __aenter__(self) -> FakeEngine:
        await self._server.start()
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        await self._server.stop(0)
        self._context.destroy(linger=0)

    async def start(self) -> None:
        self._next = 0
        self._buffer.clear()
        self._pub = await self._bound(zmq.PUB, "pub")
        router = await self._bound(zmq.ROUTER, "replay")
        self._task = asyncio.create_task(self._serve_replays(router))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._pub is not None:
            self._pub.close(0)
        self._pub = self._task = None

    async def publish(self, *payloads: bytes) -> None:
        for payload in payloads:
            assert self._pub is not None
            seq = self._skip(payload)
            await self._pub.send_multipart([b"kv-events", seq.to_bytes(8, "big"), payload])

    def lose(self, *payloads: bytes) -> None:
        """Publish batches that no subscriber gets."""
        for payload in payloads:
            self._skip(payload)

    def forget(self) -> None:
        """What was published so far cannot be replayed any more."""
        self._buffer.clear()

    def _skip(self, payload: bytes) -> int:
        seq = self._next
        self._next += 1
        self._buffer.append((seq, payload))
        return seq

    async def _bound(self, kind: int, name: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        if name not in self._ports:
            self._ports[name] = socket.bind_to_random_port("tcp://127.0.0.1")
            return socket
        async with asyncio.timeout(30):
            while True:
                try:
                    socket.bind(f"tcp://127.0.0.1:{self._ports[name]}")
                except zmq.ZMQError:  # the socket that was closed last lets go of it in ZMQ's own time
                    await asyncio.sleep(0.01)
                else:
                    return socket

    async def _serve_replays(self, router: zmq.asyncio.Socket) -> None:
        try:
            while True:
                identity, empty, start = await router.recv_multipart()
                self.asked.append(int.from_bytes(start, "big"))
                if not self._replays:
                    continue
                topic = [b"kv-events"] if self._topics_in_replay else []
                for seq, payload in tuple(self._buffer):
                    if seq in self.holes:
                        self.holes.discard(seq)
                    elif seq >= self.asked[-1]:
                        await router.send_multipart([identity, empty, *topic, seq.to_bytes(8, "big"), payload])
                await router.send_multipart([identity, empty, *topic, END, b""])
        finally:
            router.close(0)

    async def respond(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of what no other path answers."""
        return 404, b""

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answers.wait()
        known = {"/health": b"", "/metrics": (METRICS % self.values).encode()}
        path, sent = scope["path"], b""
        if scope["method"] == "POST":
            sent = (await receive())["body"]
        if path in known:
            status, body = self.health, known[path]
        elif path == "/tokenize":
            tokens = self.tokenize(json.loads(sent))
            refused = isinstance(tokens, int)
            status, body = (
                (tokens, b"{}") if refused else (200, json.dumps({"tokens": tokens, "max_model_len": 2048}).encode())
            )
        else:
            status, body = await self.respond(path, sent)
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def payloads(captured: Iterable[Any]) -> list[bytes]:
    return [message.payload for message in captured]
