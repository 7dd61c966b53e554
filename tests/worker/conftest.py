"""A worker in this process, and a client that calls it through ASGI. Without sockets, time may be virtual."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from worker.emulator.generators import make_generator
from worker.emulator.rank import Rank
from worker.main import Worker
from worker.settings import Settings

CAPTURES = Path(__file__).parent.parent / "data" / "vllm"


@dataclass
class Reply:
    """An answer as it came: `writes` are its body's parts with the loop's time of each."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    writes: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.writes)

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def data(self) -> list[str]:
        """The data lines of a stream of server-sent events."""
        return [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]

    @property
    def chunks(self) -> list[Any]:
        """The JSON of each data line but [DONE]."""
        return [json.loads(line) for line in self.data if line != "[DONE]"]


class Client:
    """Calls an ASGI app. `started` is set when the answer's head has come; `gate` holds writes back while cleared."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def request(
        self,
        method: str,
        path: str,
        body: Any = b"",
        headers: dict[str, str] | None = None,
        *,
        into: Reply | None = None,
        gate: asyncio.Event | None = None,
    ) -> Reply:
        reply = Reply() if into is None else into
        sent = {"content-type": "application/json"} if method == "POST" else {}
        sent |= {name.lower(): value for name, value in (headers or {}).items()}
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent.items()],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if gate is not None:
                await gate.wait()
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = [(name.decode(), value.decode("latin-1")) for name, value in message["headers"]]
            else:
                reply.writes.append((asyncio.get_running_loop().time(), message.get("body", b"")))

        await self._app(scope, receive, send)
        return reply

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return await self.request("GET", path, b"", headers)

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return await self.request("POST", path, body, headers)

    def begin(self, method: str, path: str, body: Any = b"", **options: Any) -> tuple[asyncio.Task[Reply], Reply]:
        """Start a request; cancelling its task is what the server does when a client leaves."""
        reply = Reply()
        return asyncio.create_task(self.request(method, path, body, into=reply, **options)), reply


@dataclass
class Harness:
    worker: Worker
    client: Client

    @property
    def rank(self) -> Rank:
        """The worker's engine; of several data-parallel ones the first."""
        return self.worker.ranks[0]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture
async def start(tokenizer: Tokenizer) -> AsyncIterator[Callable[..., Harness]]:
    """Start a worker with some settings. It uses the event loop's clock, virtual or real."""
    workers: list[Worker] = []

    def start_one(**settings: Any) -> Harness:
        chosen = Settings(**{"model": "tiny-llama", "max_model_len": 2048, **settings})
        loop = asyncio.get_running_loop()
        generator = make_generator(chosen.generator, tokenizer, seed=chosen.seed, mean_tokens=chosen.mean_output_tokens)
        worker = Worker(chosen, tokenizer, generator, 8100, clock=loop.time)
        workers.append(worker)
        return Harness(worker, Client(worker.app))

    yield start_one
    for worker in workers:
        worker.close()


@dataclass(frozen=True)
class Capture:
    """What a real vLLM was asked and answered."""

    method: str
    path: str
    request: bytes
    status: int
    headers: list[tuple[str, str]]
    body: str

    @property
    def chunks(self) -> list[Any]:
        lines = [line[6:] for line in self.body.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def read_capture(name: str) -> Capture:
    lines = (CAPTURES / f"{name}.txt").read_text().split("\n")
    method, path, request = "GET", "", b""
    while lines[0].startswith("###"):
        line = lines.pop(0)
        if line.startswith("### body: "):
            request = line.removeprefix("### body: ").encode()
        else:
            method, path = line.split(" ")[1:3]
    status = int(lines.pop(0).split(" ")[1])
    headers = []
    while line := lines.pop(0):
        name, _, value = line.partition(": ")
        headers.append((name, value))
    return Capture(method, path, request, status, headers, "\n".join(lines))


@pytest.fixture
def capture() -> Callable[[str], Capture]:
    return read_capture
