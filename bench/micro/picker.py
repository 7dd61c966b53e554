"""The CPU time of a request through a gateway that asks the endpoint picker: `python -m bench.micro.picker [--json]`.

A real Envoy (extra `envoy`) sends requests to two servers that answer at once. A router is its picker
over TLS, for bodies in full duplex and for buffered ones, and serves its data port, too. A second Envoy is the router's
own data plane (`runtime.envoy`). Every kind of request goes to each of them, to the same Envoy without a picker, and to
the router's data port, in turns, so that all meet the same machine; figures are medians of the turns. Beside them, over
the same Envoy, handlers that decide nothing: over the router's own gRPC, and over `grpc.aio`.

On a machine that does other work, too, compare the figures of one run with one another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from bench.gateway import Listener, Picker, gateway_config
from router.picker import replies
from router.picker.protocol import ProcessingRequest
from router.picker.server import SERVICE
from runtime.envoy.binary import envoy_binary
from runtime.envoy.bootstrap import bootstrap, endpoints
from runtime.envoy.messages import Message
from runtime.envoy.settings import DataPlane, Files
from runtime.grpc.call import Call
from runtime.grpc.server import GrpcServer
from runtime.sockets import listen

TEXT = "The quick brown fox jumps over the lazy dog. "
EVENTS = 50
EVENT_SECONDS = 0.001
CONNECTIONS = 16
WORKERS = 2
PATIENCE = 60.0
"""Seconds for the processes to be ready."""
SETTLING = 0.1
"""Seconds after which the processes have done what a turn left them."""
_WHOLE = orjson.dumps({"id": "c", "choices": [{"index": 0, "text": "Hello", "finish_reason": "length"}]})
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_WHOLE), _WHOLE)
_EVENT = b'data: {"id":"c","choices":[{"index":0,"text":"tok"}]}\n\n'
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


# --- the other end of everything ------------------------------------------------------------------------


class Worker(asyncio.Protocol):
    """Answers requests whole, or in events if they ask for a stream."""

    def __init__(self) -> None:
        self._held = b""
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:end].lower()
            at = head.find(b"content-length:")
            stop = end + 4 + (int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0)
            if len(self._held) < stop:
                return
            request, self._held = self._held[:stop], self._held[stop:]
            if request.startswith(b"POST") and b'"stream":true' in request:
                task = asyncio.ensure_future(self._stream())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                answered = request.startswith((b"POST", b"GET /health"))
                self._transport.write(_ANSWER if answered else b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    async def _stream(self) -> None:
        self._transport.write(_STREAM)
        for _ in range(EVENTS):
            self._transport.write(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))
            await asyncio.sleep(EVENT_SECONDS)
        self._transport.write(b"0\r\n\r\n")


class Empty:
    """Sends every request where it would have gone, and its body back."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._body = b""

    def message(self, data: bytes) -> None:
        body = ProcessingRequest.FromString(data).request_body
        self._body += body.body
        if body.end_of_stream:
            self._call.finish(messages=_unchanged(self._body))

    def input_ended(self) -> None:
        self._call.finish()

    def lost(self) -> None:
        pass


def _unchanged(body: bytes) -> list[bytes]:
    length = [(b"content-length", b"%d" % len(body))]
    return [replies.routed("127.0.0.1:1", length), *replies.request_pieces(body, last=True)]


async def _grpc_aio(port: int) -> None:
    import grpc
    import grpc.aio

    async def process(_: Any, context: Any) -> bytes:
        body = b""
        while (data := await context.read()) is not grpc.aio.EOF:
            part = ProcessingRequest.FromString(data).request_body
            body += part.body
            if part.end_of_stream:
                break
        *first, last = _unchanged(body)
        for each in first:
            await context.write(each)
        return last

    server = grpc.aio.server(options=[("grpc.http2.bdp_probe", 0)])
    methods = {"Process": grpc.stream_unary_rpc_method_handler(process)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def _serve(kind: str, port: int) -> None:
    match kind:
        case "worker":
            server = await asyncio.get_running_loop().create_server(Worker, sock=listen("127.0.0.1", port))
            await server.serve_forever()
        case "own gRPC":
            await GrpcServer({f"/{SERVICE}/Process": Empty}).start(listen("127.0.0.1", port))
            await asyncio.Event().wait()
        case _:
            await _grpc_aio(port)


# --- measuring ------------------------------------------------------------------------------------------


def _cpu(process: subprocess.Popen[bytes]) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _load(port: int, body: bytes, count: int) -> None:
    """So many requests over some connections. Raises `RuntimeError` unless all are answered."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    request = head % len(body) + body
    left = count

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        while left > 0:
            left -= 1
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not answer.startswith(b"http/1.1 200"):
                raise RuntimeError(f"port {port} answered {answer[:300]!r}")
            if b"chunked" in answer:
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    await reader.readexactly(size + 2)
                await reader.readexactly(2)
            else:
                await reader.readexactly(int(answer.partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


async def _until_answered(port: int) -> None:
    """Until requests to this port succeed."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return await _load(port, orjson.dumps({"prompt": "Hi", "max_tokens": 1}), 1)
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        return [held.enter_context(listen("127.0.0.1", 0)).getsockname()[1] for _ in range(count)]


def _requests(count: int) -> Iterator[tuple[str, bytes, int]]:
    """Name, body and number of each kind of request."""
    for name, length, number, stream in (
        ("4 KB", 4096, count, False),
        ("100 KB", 102_400, count // 10, False),
        (f"SSE, {EVENTS} events", 4096, count // 5, True),
    ):
        prompt = (TEXT * (length // len(TEXT) + 1))[:length]
        yield name, orjson.dumps({"prompt": prompt, "max_tokens": 2, "stream": stream}), max(number, 1)


def _listeners() -> dict[str, Listener]:
    """What is asked, by the name of the process that is measured beside Envoy."""
    return {
        "picker": Listener("picker"),
        "picker, buffered": Listener("picker", buffered=True),
        "own gRPC": Listener("own gRPC"),
        "grpc.aio": Listener("grpc.aio"),
        "": Listener(),
    }


async def measure(count: int, turns: int) -> dict[str, dict[str, float]]:
    """Microseconds of CPU time for each request, by kind of request and by process. `count`: requests in a turn."""
    listeners = _listeners()
    by_name = dict(zip(listeners, _free_ports(len(listeners)), strict=True))
    own, data, management, asked, *rest = _free_ports(4 + 2 + WORKERS)
    empty_ports, workers = dict(zip(("own gRPC", "grpc.aio"), rest, strict=False)), rest[2:]
    pickers = {"picker": Picker(asked, tls=True), **{name: Picker(port) for name, port in empty_ports.items()}}
    with tempfile.TemporaryDirectory(prefix="kvcluster-") as folder, contextlib.ExitStack() as running:
        files = Files(*(f"{folder}/{name}" for name in ("endpoints.json", "picker.sock", "admin.sock")))

        def start(*command: object) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)  # noqa: S603  ours
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        def write(file: Path, content: Message) -> None:
            file.write_bytes(orjson.dumps(content))

        def child(kind: str, port: int) -> subprocess.Popen[bytes]:
            return start(sys.executable, "-m", "bench.micro.picker", "--serve", kind, "--port", port)

        def envoy(name: str, config: Message) -> subprocess.Popen[bytes]:
            file = Path(folder) / f"{name}.json"
            write(file, config)
            options = ("--concurrency", 1, "--disable-hot-restart", "--log-level", "error")
            return start(envoy_binary(), "-c", file, *options)

        for port in workers:
            child("worker", port)
        urls = ",".join(f"http://127.0.0.1:{port}" for port in workers)
        addresses = [f"127.0.0.1:{port}" for port in workers]
        write(Path(files.endpoints), endpoints(addresses, 0))
        router = start(
            sys.executable, "-m", "router.main", "--mode", "both", "--host", "127.0.0.1", "--port", data,
            "--management-host", "127.0.0.1", "--management-port", management, "--picker-host", "127.0.0.1",
            "--picker-port", asked, "--picker-health-port", -1, "--tokenizer", "gpt2", "--workers", urls,
            "--picker-socket", files.picker, "--envoy-endpoints", files.endpoints, "--envoy-admin", files.admin,
            "--log-level", "warning",
        )  # fmt: skip
        empty = {name: child(name, port) for name, port in empty_ports.items()}
        by_port = {by_name[name]: each for name, each in listeners.items()}
        gateway = envoy("gateway", gateway_config(by_port, pickers, workers))
        plane = envoy("plane", bootstrap(DataPlane(files, own, "127.0.0.1")))
        for port in (data, own, *by_port):
            await _until_answered(port)

        async def turn(port: int, body: bytes, number: int, *of: subprocess.Popen[bytes]) -> list[float]:
            await _load(port, body, max(number // 10, 1))
            await asyncio.sleep(SETTLING)
            before = [_cpu(each) for each in of]
            await _load(port, body, number)
            await asyncio.sleep(SETTLING)
            return [(_cpu(each) - was) / number * 1e6 for each, was in zip(of, before, strict=True)]

        figures: dict[str, dict[str, float]] = {}
        for kind, body, number in _requests(count):
            seen: dict[str, list[float]] = {}

            async def measured(
                name: str, port: int, process: subprocess.Popen[bytes], beside: subprocess.Popen[bytes]
            ) -> None:
                of_process, of_envoy = await turn(port, body, number, process, beside)  # noqa: B023  called at once
                seen.setdefault(name, []).append(of_process)  # noqa: B023
                seen.setdefault(f"Envoy with {name}", []).append(of_envoy)  # noqa: B023

            for _ in range(turns):
                await measured("own data plane", own, router, plane)
                for name, process in {"picker": router, "picker, buffered": router, **empty}.items():
                    await measured(name, by_name[name], process, gateway)
                seen.setdefault("Envoy alone", []).extend(await turn(by_name[""], body, number, gateway))
                seen.setdefault("data port", []).extend(await turn(data, body, number, router))
            figures[kind] = {name: statistics.median(each) for name, each in seen.items()}
        return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=3000, help="requests of 4 KB in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        uvloop.run(_serve(options.serve, options.port))
        return
    figures = uvloop.run(measure(options.requests, options.turns))
    if options.json:
        sys.stdout.write(orjson.dumps(figures).decode() + "\n")
        return
    table = Table("process", *figures, title="Microseconds of CPU time a request")
    for name in next(iter(figures.values())):
        table.add_row(name, *(f"{of_kind[name]:,.0f}" for of_kind in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
