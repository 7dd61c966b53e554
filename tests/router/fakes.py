"""Workers that misbehave on purpose: real sockets on loopback, scripted answers."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import orjson

from kvcache.feed import MSGPACK, Batch, Event, Load, Snapshot, WorkerInfo, encode_batch, encode_snapshot
from kvcache.keys import KEY_SCHEME, BlockKey
from runtime.draining import DRAINING_HEADER


@dataclass
class Received:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


Script = Callable[["Connection", Received], Awaitable[None]]


@dataclass
class Connection:
    """The server's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, body: bytes, content_type: str = "application/json", extra: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        await self.send(head.encode() + body)

    async def begin_stream(self) -> None:
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """Close with a reset, though all that came was read: a load balancer's, or that of a pod's address that is
        taken down. (A killed process sends one only if it had bytes to read.)"""
        send_reset(self.writer)

    async def closed(self) -> None:
        """Wait until the other end closes."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            return


def send_reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset. Without SO_LINGER it would be an ordinary end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def token(text: str, finish: str | None = None) -> bytes:
    """One event of a completion's stream, as vLLM writes it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return b"data: " + orjson.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}) + b"\n\n"


def usage(cached: int, completion: int = 2) -> bytes:
    """The last event of a stream that reports its usage."""
    details = {
        "prompt_tokens": 100,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + orjson.dumps({"id": "cmpl-1", "choices": [], "usage": details}) + b"\n\n"


ERROR_EVENT = (
    b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", '
    b'"type": "InternalServerError", "param": null, "code": 500}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def completion(text: str, *, finish: str = "length", cached: int = 0) -> bytes:
    """Body of a completion that is no stream."""
    return orjson.dumps(
        {
            "id": "cmpl-1",
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": cached}},
        }
    )


async def good(connection: Connection, request: Received) -> None:
    """Answer as a healthy worker: a stream if asked for."""
    if b'"stream":true' in request.body.replace(b" ", b""):
        await connection.begin_stream()
        for event in (token("Hel"), token("lo", "length"), usage(16), DONE):
            await connection.chunk(event)
        await connection.end_stream()
    else:
        await connection.answer(200, completion("Hello", cached=16))


async def resets(connection: Connection, request: Received) -> None:
    connection.reset()


def answering(status: int, *, message: str = "no", kind: str = "InternalServerError", extra: str = "") -> Script:
    """An error in vLLM's form."""
    body = orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})

    async def script(connection: Connection, request: Received) -> None:
        await connection.answer(status, body, extra=extra)

    return script


def streaming(
    *events: bytes, release: asyncio.Event | None = None, rest: Sequence[bytes] = (), end: bool = True
) -> Script:
    """A stream of these events, and once `release` is set of the rest; `end=False`: the connection is then reset."""

    async def script(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        for event in events:
            await connection.chunk(event)
        if release is not None:
            await release.wait()
        for event in rest:
            await connection.chunk(event)
        if end:
            await connection.end_stream()
        else:
            connection.reset()

    return script


def good_after(release: asyncio.Event) -> Script:
    """As `good`, but nothing of the answer comes before `release` is set."""

    async def script(connection: Connection, request: Received) -> None:
        await release.wait()
        await good(connection, request)

    return script


@dataclass
class FakeWorker:
    """A worker on a port of its own. `script` answers the API; /health and the feed are answered here."""

    script: Script = good
    health: int = 200
    draining: bool = False
    """Its /health says that it leaves, though it still takes requests."""
    name: str = "fake"
    model: str = "m"
    block_size: int = 16
    fingerprint: str = ""
    engine: str = ""
    complete: bool = True
    epoch: int = 1
    seq: int = 0
    blocks: list[tuple[BlockKey, BlockKey | None]] = field(default_factory=list)
    ranks: int = 1
    """Data-parallel ranks; the blocks are those of rank 0, whose feed alone can publish."""
    rank_blocks: dict[int, list[tuple[BlockKey, BlockKey | None]]] = field(default_factory=dict)
    """Those of the others."""
    serves_feed: bool = False
    received: list[Received] = field(default_factory=list)
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    snapshots: int = 0
    feeds: list[Connection] = field(default_factory=list)
    feed_positions: list[str | None] = field(default_factory=list)
    port: int = 0

    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.name,
            epoch=self.epoch,
            model=self.model,
            block_size=self.block_size,
            fingerprint=self.fingerprint,
            key_scheme=KEY_SCHEME,
            capacity=1000,
            engine=self.engine,
            complete=self.complete,
        )

    def snapshot(self, rank: int = 0) -> Snapshot:
        info = self.info
        if self.ranks > 1:
            info = replace(info, worker_id=f"{self.name}/{rank}", rank=rank, ranks=self.ranks)
        blocks = self.rank_blocks.get(rank, []) if rank else self.blocks
        return Snapshot(info, self.seq, Load(total_blocks=1000, free_blocks=1000), tuple(blocks))

    def serve_feed(self, fingerprint: str, name: str | None = None, engine: str = "") -> None:
        """Serve the cache feed from now on; with `engine`, as the agent of that engine."""
        self.engine = engine
        self.fingerprint, self.serves_feed = fingerprint, True
        self.name = name or self.name

    async def publish(self, *events: Event, seq: int | None = None, epoch: int | None = None) -> None:
        """Send the next batch (or one with a position of the test's choice) to every subscriber."""
        self.seq = self.seq + 1 if seq is None else seq
        batch = Batch(
            self.epoch if epoch is None else epoch, self.seq, events, Load(total_blocks=1000, free_blocks=1000)
        )
        await self.send_event("batch", encode_batch(batch))

    async def send_event(self, name: str, data: bytes) -> None:
        for feed in self.feeds:
            await feed.chunk(b"event: %s\ndata: %s\n\n" % (name.encode(), data))

    def drop_feeds(self) -> None:
        """Break every subscriber's stream."""
        for feed in self.feeds:
            feed.reset()
        self.feeds.clear()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self, *, reset: bool = False) -> None:
        """Close the port and every connection (`reset`: as a pod's address that is taken down)."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            if reset:
                send_reset(writer)
            else:
                writer.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        connection = Connection(reader, writer)
        try:
            while (request := await _read(reader)) is not None:
                if self.frozen.is_set():
                    await asyncio.Event().wait()
                await self._dispatch(connection, request)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _dispatch(self, connection: Connection, request: Received) -> None:
        path, _, query = request.target.partition("?rank=")
        if request.target == "/health":
            extra = f"{DRAINING_HEADER}: 1\r\n" if self.draining else ""
            await connection.answer(self.health, b"", extra=extra)
        elif path == "/cache/state" and self.serves_feed:
            self.snapshots += 1
            await connection.answer(200, encode_snapshot(self.snapshot(int(query or 0)), MSGPACK), MSGPACK)
        elif path == "/cache/events" and self.serves_feed:
            self.feed_positions.append(request.header("last-event-id"))
            await connection.begin_stream()
            self.feeds.append(connection)
            await connection.closed()
        elif request.target.startswith("/cache/"):
            await connection.answer(404, b'{"detail":"Not Found"}')
        else:
            self.received.append(request)
            await self.script(connection, request)


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    line, *fields = head.rstrip("\r\n").split("\r\n")
    method, target, _ = line.split(" ")
    headers = [(name.lower(), value) for name, _, value in (field.partition(": ") for field in fields)]
    if ("transfer-encoding", "chunked") in headers:
        return Received(method, target, headers, await _read_chunks(reader))
    length = next((int(value) for name, value in headers if name == "content-length"), 0)
    return Received(method, target, headers, await reader.readexactly(length))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readuntil(b"\r\n")
    await reader.readuntil(b"\r\n")
    return body


@asynccontextmanager
async def fake_workers(*scripts: Script) -> AsyncIterator[list[FakeWorker]]:
    """One worker for each script."""
    async with AsyncExitStack() as stack:
        workers = []
        for number, script in enumerate(scripts):
            worker = FakeWorker(script, name=f"w{number}")
            await worker.start()
            stack.push_async_callback(worker.stop)
            workers.append(worker)
        yield workers
