"""`vllm serve MODEL ...` in miniature: vLLM's prefix cache, its KV events by ZMQ, and just enough of its HTTP API.

Takes the flags that the controller gives vLLM and, as vLLM does, no others. Completions that are not streamed are
answered at once with as many tokens as they ask for; their whole blocks go into an LRU cache, which is published as
vLLM 0.32 does (events as maps, `[topic, sequence, payload]`, replay from a ROUTER socket): the wire format was compared
with captures from a running engine (tests/data/vllm). Not modelled: chat, streams, sampling, batching, time, /metrics
beyond what the cache agent reads, and everything else.

MINIATURE_HOST is where it listens; without it on every address, as vLLM does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections import OrderedDict, deque
from typing import Any

import msgpack
import zmq
import zmq.asyncio
from starlette.types import Receive, Scope, Send

from kvcache.tokens.tokenizer import load_tokenizer
from runtime.http.server import HttpLimits, HttpServer
from runtime.process import run
from runtime.sockets import listen

END = b"\xff" * 8
REMEMBERED = 10_000
"""Batches that can be replayed."""
TOKEN = " ok"
METRICS = """\
vllm:num_requests_running{{engine="0",model_name="{model}"}} 0.0
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="{model}"}} 0.0
vllm:cache_config_info{{block_size="{block_size}",engine="0",num_gpu_blocks="{blocks}"}} 1.0
"""


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 for a flag that the controller is not known to give."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for flag in ("--port", "--block-size", "--max-model-len", "--num-gpu-blocks-override", "--shutdown-timeout"):
        parser.add_argument(flag, type=int)
    for flag in ("--served-model-name", "--tokenizer"):
        parser.add_argument(flag)
    for flag in ("--enable-prefix-caching", "--enable-prompt-tokens-details"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--kv-events-config", type=json.loads)
    return parser.parse_args(argv)


class Publisher:
    """vLLM's ZmqEventPublisher."""

    def __init__(self, config: dict[str, Any], host: str) -> None:
        self._context = zmq.asyncio.Context()
        self._topic = str(config["topic"]).encode()
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED)
        self._pub = self._bound(zmq.PUB, config["endpoint"].replace("*", host or "*"))
        self._replay = self._bound(zmq.ROUTER, config["replay_endpoint"])

    def _bound(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        return socket

    async def publish(self, events: list[dict[str, Any]]) -> None:
        """One batch."""
        sequence = self._sent[-1][0] + 1 if self._sent else 0
        payload = msgpack.packb([time.time(), events, 0])
        self._sent.append((sequence, payload))
        await self._pub.send_multipart([self._topic, sequence.to_bytes(8, "big"), payload])

    async def answer_replays(self) -> None:
        """Until it is cancelled."""
        while True:
            identity, empty, start = await self._replay.recv_multipart()
            for sequence, payload in tuple(self._sent):
                if sequence >= int.from_bytes(start, "big"):
                    frames = [identity, empty, self._topic, sequence.to_bytes(8, "big"), payload]
                    await self._replay.send_multipart(frames)
            await self._replay.send_multipart([identity, empty, self._topic, END, b""])

    def close(self) -> None:
        """Both sockets, whatever waits in them."""
        self._context.destroy(linger=0)


class PrefixCache:
    """Whole blocks by the hash of their prefix, the least recently used first."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self.block_size = block_size
        self.blocks = blocks
        self._known: OrderedDict[int, None] = OrderedDict()

    def take(self, tokens: list[int]) -> tuple[int, list[dict[str, Any]]]:
        """(cached tokens, events) of a prompt that is computed now."""
        size, parent, cached, events = self.block_size, None, 0, list[dict[str, Any]]()
        # The last token is always computed: an engine needs its logits.
        reusable = (len(tokens) - 1) // size
        for index in range(len(tokens) // size):
            block = tokens[index * size : (index + 1) * size]
            name = int.from_bytes(hashlib.sha256(repr((parent, block)).encode()).digest()[:8], "big")
            if name not in self._known:
                events.append(self._stored(name, parent, block))
            elif index < reusable and cached == index * size:
                cached += size
            self._known[name] = None
            self._known.move_to_end(name)
            parent = name
        while len(self._known) > self.blocks:
            name, _ = self._known.popitem(last=False)
            events.append({"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU"})
        return cached, events

    def _stored(self, name: int, parent: int | None, block: list[int]) -> dict[str, Any]:
        return {
            "type": "BlockStored",
            "block_hashes": [name],
            "parent_block_hash": parent,
            "token_ids": block,
            "block_size": self.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }


class Server:
    """The HTTP API."""

    def __init__(self, options: argparse.Namespace, publisher: Publisher) -> None:
        self._model = options.served_model_name
        self._cache = PrefixCache(options.block_size, options.num_gpu_blocks_override)
        self._tokenizer = load_tokenizer(options.tokenizer or options.model)
        self._publisher = publisher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, content = await self._answer(scope["path"], body)
        head = {"type": "http.response.start", "status": status}
        kind = b"text/plain" if scope["path"] == "/metrics" else b"application/json"
        await send({**head, "headers": [(b"content-type", kind), (b"content-length", b"%d" % len(content))]})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/health":
            return 200, b""
        if path == "/metrics":
            known = {"model": self._model, "block_size": self._cache.block_size, "blocks": self._cache.blocks}
            return 200, METRICS.format(**known).encode()
        if path == "/v1/models":
            model = {"id": self._model, "object": "model", "owned_by": "vllm"}
            return 200, json.dumps({"object": "list", "data": [model]}).encode()
        if path != "/v1/completions":
            return 404, json.dumps({"detail": "Not Found"}).encode()
        return await self._complete(json.loads(body))

    async def _complete(self, asked: dict[str, Any]) -> tuple[int, bytes]:
        if asked.get("stream") or not isinstance(asked.get("prompt"), str):
            error = {"message": "the miniature answers text prompts that are not streamed", "type": "BadRequestError"}
            return 400, json.dumps({"error": error}).encode()
        tokens, count = self._tokenizer.encode(asked["prompt"]), int(asked.get("max_tokens") or 16)
        cached, events = self._cache.take(tokens)
        if events:
            await self._publisher.publish(events)
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": count,
            "total_tokens": len(tokens) + count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        choice = {"index": 0, "text": TOKEN * count, "logprobs": None, "finish_reason": "length"}
        head = {"id": f"cmpl-{time.time_ns()}", "object": "text_completion", "model": self._model}
        return 200, json.dumps({**head, "choices": [choice], "usage": usage}).encode()


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> int:
    """Until it is told to stop."""
    host = os.environ.get("MINIATURE_HOST", "")
    publisher = Publisher(options.kv_events_config, host)
    server = HttpServer(Server(options, publisher), listen(host or "0.0.0.0", options.port), HttpLimits())
    replaying = asyncio.create_task(publisher.answer_replays())
    await server.start()
    try:
        await stop.wait()
    finally:
        await server.stop(options.shutdown_timeout)
        replaying.cancel()
        await asyncio.gather(replaying, return_exceptions=True)
        publisher.close()
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda stop: serve(arguments(sys.argv[1:]), stop)))
