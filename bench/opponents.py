"""CPU time of a request in the router process, beside other routers on the same machine.

    python -m bench.opponents --router 'sglang=sglang-router --worker-urls {workers} --port {port} --policy cache_aware'

Every router has the same trivial engines behind it (one process) and gets the same chats over the same 32 keep-alive
connections: small prompts, prompts of 4 KB of numbers (2 KB shared in groups, 2 KB of their own), and small prompts
whose answers are streams, either at once or an event every 10 ms. It is charged the CPU seconds that the operating
system accounts to its process and threads, for each request or for each event. Compare the ratios within one run, of
routers that took turns: the figures themselves depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench.foreign import RouterCommand, free_port

ENGINES = 8
CONNECTIONS = 32
READY_SECONDS = 60.0
UNPACED, PACED = 256, 100
"""Events of a stream; a request asks for as many tokens, which tells the engine whether they are paced."""
PACE = 0.01
"""Seconds between two events of a paced stream."""

_COMPLETION = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()
_MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}).encode()


def _response(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _event(fields: object) -> bytes:
    data = b"data: %s\n\n" % (fields if isinstance(fields, bytes) else json.dumps(fields).encode())
    return b"%x\r\n%s\r\n" % (len(data), data)


_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = _event(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
    }
)
_STREAM_END = _event(b"[DONE]") + b"0\r\n\r\n"
_ANSWER = _response("200 OK", _COMPLETION)
_MODEL_LIST = _response("200 OK", _MODELS)
_NO_FEED = _response("404 Not Found", b'{"detail":"Not Found"}')


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one router for one kind of request. CPU time is that of its process tree alone, in microseconds
    for each request, of streams for each event."""

    router: str
    kind: str
    requests: int
    failed: int
    cpu_us: float
    requests_per_second: float


async def _message(stream: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """First line and headers of the next message, in lower case, and its body.

    Raises `EOFError` at the end of the stream.
    """
    head = (await stream.readuntil(b"\r\n\r\n")).lower()
    if b"transfer-encoding: chunked" in head:
        return head, await stream.readuntil(b"0\r\n\r\n")
    _, stated, length = head.partition(b"content-length:")
    return head, await stream.readexactly(int(length.split(b"\r\n", 1)[0])) if stated else b""


async def _engine(requests: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
    """Answers every request at once, so that only the router takes time."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            head, body = await _message(requests)
            first_line = head.split(b"\r\n", 1)[0]
            if first_line.startswith(b"post"):
                fields = json.loads(body)
                if fields.get("stream"):
                    # sglang-router writes a request anew, with the field's later name.
                    await _stream(answers, fields.get("max_tokens") or fields["max_completion_tokens"])
                else:
                    answers.write(_ANSWER)
            else:
                answers.write(_NO_FEED if b"/cache/" in first_line else _MODEL_LIST)
    answers.close()


async def _stream(answers: asyncio.StreamWriter, events: int) -> None:
    answers.write(_STREAM_HEAD + _EVENT)
    if events == PACED:
        for _ in range(events - 1):
            await asyncio.sleep(PACE)
            answers.write(_EVENT)
    else:
        answers.write(_EVENT * (events - 1))
    answers.write(_STREAM_END)
    await answers.drain()


async def _client(port: int, requests: Sequence[bytes]) -> int:
    """Send the requests over one connection, each when the last one is answered. Returns how many failed."""
    answers, connection = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    answered = 0
    with contextlib.suppress(EOFError, ConnectionError):
        for request in requests:
            connection.write(request)
            head, _ = await _message(answers)
            answered += b" 200 " in head.split(b"\r\n", 1)[0]
    connection.close()
    return len(requests) - answered


def _request(content: str, max_tokens: int, *, stream: bool = False) -> bytes:
    message = {"role": "user", "content": content}
    fields = {"model": "m", "max_tokens": max_tokens, "messages": [message], **({"stream": True} if stream else {})}
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def prompts(count: int, seed: int = 0) -> list[bytes]:
    """Whole HTTP requests: chats of 4 KB of numbers, the first half of which an eighth of them share."""
    rng = random.Random(seed)

    def text(size: int) -> str:
        return " ".join(str(rng.randrange(100_000, 1_000_000)) for _ in range(size // 7))

    shared = [text(2048) for _ in range(8)]
    return [_request(shared[number % len(shared)] + " " + text(2048), 1) for number in range(count)]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: how many there are, and how many events the answer of each has (1: it is no stream)."""

    requests: Sequence[bytes]
    events: int = 1


def kinds(count: int) -> dict[str, Kind]:
    """All kinds, with `count` requests that are no streams, and fewer streams."""
    small = [f"Question {number}: who wrote it?" for number in range(count)]
    return {
        "small prompt": Kind([_request(content, 1) for content in small]),
        "4 KB prompt": Kind(prompts(count)),
        "event, unpaced": Kind([_request(each, UNPACED, stream=True) for each in small[: max(count // 8, 1)]], UNPACED),
        "event, paced": Kind([_request(each, PACED, stream=True) for each in small[: max(count // 64, 1)]], PACED),
    }


def _serve_engines(ports: Sequence[int]) -> None:
    async def serve() -> None:
        servers = [await asyncio.start_server(_engine, "127.0.0.1", port) for port in ports]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    uvloop.run(serve())


def _tree(pid: int) -> list[int]:
    """A process and its descendants (Linux)."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found.extend(int(child) for child in (task / "children").read_text().split())
    return found


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, threads included (Linux)."""
    ticks = 0
    for process in _tree(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def _drive(port: int, requests: Sequence[bytes]) -> tuple[int, float]:
    """Send `requests`, dealt out to the connections. Returns how many failed, and seconds."""
    started = time.perf_counter()
    failed = await asyncio.gather(*(_client(port, requests[i::CONNECTIONS]) for i in range(CONNECTIONS)))
    return sum(failed), time.perf_counter() - started


async def _ready(port: int, request: bytes, within: float) -> None:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            failed, _ = await _drive(port, [request] * CONNECTIONS)
        except OSError:
            failed = 1
        if not failed:
            return
        await asyncio.sleep(0.2)
    raise TimeoutError(f"the router on port {port} answered no request within {within:g} s")


def measure(
    name: str,
    command: str,
    workers: Sequence[str],
    asked: Mapping[str, Kind],
    ready_seconds: float = READY_SECONDS,
) -> list[Row]:
    """Start one router by `command` (as in `RouterCommand`), drive it with each kind of request and stop it.

    Raises `RouterCommandError`, and `TimeoutError` when it does not answer.
    """
    port = free_port()
    argv = RouterCommand(name, command).words(port, workers, "m")
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - the user's command
    rows = []
    try:
        uvloop.run(_ready(port, next(iter(asked.values())).requests[0], ready_seconds))
        for kind, of_kind in asked.items():
            requests = of_kind.requests
            uvloop.run(_drive(port, requests[: max(len(requests) // 4, 1)]))  # warm caches and connections
            before = _cpu_seconds(process.pid)
            failed, seconds = uvloop.run(_drive(port, requests))
            cpu = (_cpu_seconds(process.pid) - before) / (len(requests) * of_kind.events)
            rows.append(Row(name, kind, len(requests), failed, cpu * 1e6, len(requests) / seconds))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return rows


def _print(rows: Sequence[Row], console: Console) -> None:
    """A table for each kind. The ratios are those of the medians, to our own."""
    for kind in dict.fromkeys(row.kind for row in rows):
        table = Table("router", "failed", "CPU us (median)", "min..max", "ours / this", "requests/s", title=kind)
        own = 0.0
        for name in dict.fromkeys(row.router for row in rows):
            mine = [row for row in rows if row.router == name and row.kind == kind]
            costs = [row.cpu_us for row in mine]
            median = statistics.median(costs)
            own = own or median
            table.add_row(
                name,
                str(sum(row.failed for row in mine)),
                f"{median:.1f}",
                f"{min(costs):.1f}..{max(costs):.1f}",
                f"{own / median:.2f}" if median else "",
                f"{statistics.median(row.requests_per_second for row in mine):.0f}",
            )
        console.print(table)


def main() -> None:
    """Measure every router named on the command line, KVCluster's first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--router", action="append", default=[], metavar="NAME=COMMAND", help="a router to compare with"
    )
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3, help="the routers take turns this many times")
    parser.add_argument("--kinds", default="", help="only these kinds of requests, separated by semicolons")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    own = f"{sys.executable} -m router.main --port {{port}} --management-port 0 --workers {{commas}}"
    commands = {
        "kvcluster": own,
        "kvcluster round_robin": own + " --strategy round_robin",
        **dict(router.split("=", 1) for router in options.router),
    }
    ports = [free_port() for _ in range(ENGINES)]
    engines = multiprocessing.get_context("spawn").Process(target=_serve_engines, args=(ports,), daemon=True)
    engines.start()
    workers = [f"http://127.0.0.1:{port}" for port in ports]
    asked = kinds(options.requests)
    if options.kinds:
        asked = {name: asked[name] for name in options.kinds.split(";")}
    rows = [
        row
        for _ in range(options.rounds)
        for name, command in commands.items()
        for row in measure(name, command, workers, asked)
    ]
    engines.terminate()
    console = Console()
    if options.json:
        console.print_json(json.dumps([asdict(row) for row in rows]))
    else:
        _print(rows, console)


if __name__ == "__main__":
    main()
