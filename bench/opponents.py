"""CPU time of a request in the router process, beside other routers on the same machine.

    python -m bench.opponents --router 'sglang=sglang-router --worker-urls {workers} --port {port} --policy cache_aware'

Every router has the same trivial engines behind it (one process that answers at once) and gets the same chat prompts
(2 KB shared in groups, 2 KB of their own) over the same keep-alive connections. It is charged the CPU seconds that the
operating system accounts to its process and threads. Compare the ratios within one run: requests per second depend on
the client and the engines too, which share the machine.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench.foreign import RouterCommand, free_port

ENGINES = 8
CONNECTIONS = 32
READY_SECONDS = 60.0

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


_ANSWER = _response("200 OK", _COMPLETION)
_MODEL_LIST = _response("200 OK", _MODELS)
_NO_FEED = _response("404 Not Found", b'{"detail":"Not Found"}')


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one router. CPU time is that of its process tree alone, in microseconds for each request."""

    router: str
    requests: int
    failed: int
    cpu_us_per_request: float
    requests_per_second: float


async def _message(stream: asyncio.StreamReader) -> bytes:
    """First line and headers of the next message, in lower case. Its body, whose length it states, is skipped.

    Raises `EOFError` at the end of the stream.
    """
    head = (await stream.readuntil(b"\r\n\r\n")).lower()
    _, stated, length = head.partition(b"content-length:")
    if stated:
        await stream.readexactly(int(length.split(b"\r\n", 1)[0]))
    return head


async def _engine(requests: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
    """Answers every request at once, so that only the router takes time."""
    with contextlib.suppress(EOFError, ConnectionError):
        while first_line := (await _message(requests)).split(b"\r\n", 1)[0]:
            if first_line.startswith(b"post"):
                answers.write(_ANSWER)
            else:
                answers.write(_NO_FEED if b"/cache/" in first_line else _MODEL_LIST)
    answers.close()


async def _client(port: int, requests: Sequence[bytes]) -> int:
    """Send the requests over one connection, each when the last one is answered. Returns how many failed."""
    answers, connection = await asyncio.open_connection("127.0.0.1", port)
    answered = 0
    with contextlib.suppress(EOFError, ConnectionError):
        for request in requests:
            connection.write(request)
            answered += b" 200 " in (await _message(answers)).split(b"\r\n", 1)[0]
    connection.close()
    return len(requests) - answered


def prompts(count: int, seed: int = 0) -> list[bytes]:
    """Whole HTTP requests: chats of 4 KB, the first half of which an eighth of them share."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("stor", "rout", "cach", "block", "queu") for b in ("age", "ing", "ed", "s", "es")]

    def text(size: int) -> str:
        return " ".join(rng.choice(words) for _ in range(size // 7))

    shared = [text(2048) for _ in range(8)]
    requests = []
    for i in range(count):
        content = shared[i % len(shared)] + " " + text(2048)
        message = {"role": "user", "content": content}
        body = json.dumps({"model": "m", "max_tokens": 1, "messages": [message]}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


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
    requests: Sequence[bytes],
    ready_seconds: float = READY_SECONDS,
) -> Row:
    """Start one router by `command` (as in `RouterCommand`), drive it and stop it.

    Raises `RouterCommandError`, and `TimeoutError` when it does not answer.
    """
    port = free_port()
    argv = RouterCommand(name, command).words(port, workers, "m")
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - the user's command
    try:
        uvloop.run(_ready(port, requests[0], ready_seconds))
        uvloop.run(_drive(port, requests[: len(requests) // 4]))  # warm caches and connections
        before = _cpu_seconds(process.pid)
        failed, seconds = uvloop.run(_drive(port, requests))
        cpu = _cpu_seconds(process.pid) - before
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return Row(name, len(requests), failed, cpu / len(requests) * 1e6, len(requests) / seconds)


def main() -> None:
    """Measure every router named on the command line, KVCluster's first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--router", action="append", default=[], metavar="NAME=COMMAND", help="a router to compare with"
    )
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3, help="the routers take turns this many times")
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
    requests = prompts(options.requests)
    rows = [
        measure(name, command, workers, requests) for _ in range(options.rounds) for name, command in commands.items()
    ]
    engines.terminate()
    console = Console()
    if options.json:
        console.print_json(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("router", "failed", "CPU us/request (median)", "min..max", "requests/s (median)")
    for name in commands:
        mine = [row for row in rows if row.router == name]
        costs = [row.cpu_us_per_request for row in mine]
        rates = [row.requests_per_second for row in mine]
        table.add_row(
            name,
            str(sum(row.failed for row in mine)),
            f"{statistics.median(costs):.0f}",
            f"{min(costs):.0f}..{max(costs):.0f}",
            f"{statistics.median(rates):.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
