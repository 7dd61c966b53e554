"""Where the instructions of a request go in the router: `python -m bench.micro.request [--json] [--check | --write]`.

The router's own parts, from its data port to its connections to workers, run in one process; the client and eight
engines run in another, which is not counted (`bench.micro.request_peer`). Nothing runs in the background, the router's
clock is a counter, and one request is under way at a time, so that two runs execute nearly the same instructions.
`--check` compares with the committed figures of the same build of Python (`bench/micro/request.json`) and fails when a
request or an event takes over 10 % more; `--write` replaces them. docs/performance.md reads the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.table import Column, Table

from bench.micro import request_peer as peer
from bench.micro.counted import Counter, CountingError, Profile, build, profiles
from kvcache.feed import Load, Snapshot, WorkerInfo
from kvcache.keys import KEY_SCHEME
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.assembly import Router, http_limits
from router.core.decision import Decision, RouteRequest
from router.discovery.sources import StaticDiscovery
from router.settings import Settings
from router.upstream.pool import ConnectionPool
from runtime.http.context import ServerContext
from runtime.http.limits import HttpLimits
from runtime.http.reader import RequestReader
from runtime.http.server import HttpServer
from runtime.process import freeze_startup_objects
from runtime.sockets import listen

BASELINE = Path(__file__).with_suffix(".json")
LIMIT = 0.10
"""By how much more than the committed figure fails."""
CAPACITY = 27_000
TICK = 1e-5
"""Seconds by which the router's clock goes on each time it is read."""
COUNTED = 32
"""Requests in one count: a multiple of those of which one has its phases measured (`router.server.recorder`)."""
STREAMS = 4
EVENTS = 32

KINDS = {
    "small prompt": "a chat of 26 characters, answered whole",
    "4 KB, half known": "a chat of 4,096 characters of numbers, the first half of which is known",
    "4 KB, known": "the same requests again",
    "event, paced": "one event of a stream, read by itself",
    "event, unpaced": "one of 64 events that are read together",
}
LIBRARIES = {
    "python": "libpython", "uvloop": "loop.", "httptools": "parser.", "orjson": "orjson.", "tokenizer": "_tiktoken.",
    "hashing": "libcrypto", "C library": "libc.",
}  # fmt: skip
"""What the executed files are called in the table, by how their names begin."""
OTHER = "other"


# --- the counted process ----------------------------------------------------------------------------------


class Bed:
    """A router that serves the peer, on one event loop. Made within that loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._loop = asyncio.get_running_loop()
        command = [sys.executable, "-m", "bench.micro.request_peer"]
        self._peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  ours
        if self._peer.stdin is None or self._peer.stdout is None:
            raise CountingError("the client of the benchmark has no pipes")
        self._commands, self._done = self._peer.stdin, self._peer.stdout
        urls = [f"http://127.0.0.1:{int(port)}" for port in self._read().split()]
        settings = Settings.load(["--workers", ",".join(urls)])
        self.router = router = Router(settings, StaticDiscovery(urls), clock=itertools.count(1000.0, TICK).__next__)
        router.tokenizer.loaded(tokenizer)
        # A machine that is busy with other work does not make idle connections old.
        router.proxy.upstream = ConnectionPool(connect_timeout=60.0, keep_alive=3600.0)
        for number, url in enumerate(urls):
            info = WorkerInfo(
                f"worker-{number}", 1, "m", settings.block_size, tokenizer.fingerprint, KEY_SCHEME, CAPACITY
            )
            load = Load(free_blocks=CAPACITY, total_blocks=CAPACITY)
            router.fleet.add(url)
            router.fleet.apply_snapshot(url, Snapshot(info, 0, load, ()), router.clock())
        self.server = HttpServer(
            None,
            listen("127.0.0.1", 0),
            http_limits(settings),
            cancel_on_disconnect=True,
            on_refusal=router.refused,
            refusal_headers=router.cors.headers,
            handler=router.data_plane,
        )
        self._loop.add_reader(self._done, self._over)

    def _read(self) -> bytes:
        line = self._done.readline()
        if not line:
            raise CountingError("the client of the benchmark has failed")
        return line

    def _over(self) -> None:
        self._read()
        self._loop.stop()

    def send(self, command: str) -> None:
        """Let the peer carry a command out, and serve it meanwhile."""
        self._commands.write(command.encode() + b"\n")
        self._commands.flush()
        self._loop.run_forever()

    async def close(self) -> None:
        """End everything that was started."""
        self._loop.remove_reader(self._done)
        await self.server.stop(0.0)
        await self.router.proxy.upstream.close()
        await self.router.close()
        self._peer.communicate()


async def _start() -> Bed:
    bed = Bed(load_tokenizer("gpt2"))
    await bed.server.start()
    return bed


class _Nobody:
    """Listens to a reader of requests."""

    def request_begun(self) -> None:
        pass

    def head_complete(self, expects_continue: bool) -> None:
        pass

    def turned_away(self, scope: object, rest: int | None, last: bool) -> bool:
        return False

    def request_complete(self, scope: object, body: bytes | bytearray, last: bool) -> None:
        pass


def _parts(router: Router) -> Iterator[tuple[str, Callable[[], object]]]:
    """What each further part of a request takes, besides the parts before it."""
    reader = RequestReader(_Nobody(), ServerContext(_no_app, HttpLimits()), {})
    for name, text in (("small prompt", peer.SMALL), ("4 KB, known", peer.large(0))):
        whole = peer.chat(text)
        body = whole.partition(b"\r\n\r\n")[2]

        def route(body: bytes = body) -> RouteRequest:
            read = router.prompts.read_at_once("/v1/chat/completions", body)
            if read is None:
                raise CountingError("the prompt takes too long to read")
            return read

        def choose(route: Callable[[], RouteRequest] = route) -> tuple[Decision, RouteRequest]:
            request = route()
            return router.fleet.choose(request, router.clock()), request

        def account(choose: Callable[[], tuple[Decision, RouteRequest]] = choose) -> None:
            ticket = router.fleet.dispatch(*choose(), router.clock())
            ticket.served = True
            ticket.release(router.clock())

        yield f"{name}: HTTP", functools.partial(reader.feed, whole)
        yield f"{name}: prompt", route
        yield f"{name}: choice", choose
        yield f"{name}: ledger", account


async def _no_app(*_: object) -> None:
    pass


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def serve() -> None:
    """What the counted process does. The name of each count is a line of standard output."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    bed = loop.run_until_complete(_start())
    bed.send(f"connect {bed.server.port}")
    # Before it is counted everything has run once, and there is a connection to each worker.
    for command in (
        f"small 0 {COUNTED}",
        f"large {COUNTED} {COUNTED}",
        f"paced:4 0 {STREAMS}",
        f"unpaced:4 0 {STREAMS}",
    ):
        bed.send(command)
    exchanges = {
        "small prompt": f"small 0 {COUNTED}",
        "4 KB, half known": f"large 0 {COUNTED}",
        "4 KB, known": f"large 0 {COUNTED}",
        "streams": f"paced:0 0 {STREAMS}",
        "paced": f"paced:{EVENTS} 0 {STREAMS}",
        "unpaced": f"unpaced:{EVENTS} 0 {STREAMS}",
    }
    freeze_startup_objects()
    gc.disable()  # a collection in the midst of a count would be more than the count
    counter = Counter()
    for name, command in exchanges.items():
        counter.count(functools.partial(bed.send, command))
        sys.stdout.write(name + "\n")
    for name, part in _parts(bed.router):
        _repeat(part, STREAMS)
        counter.count(functools.partial(_repeat, part, COUNTED))
        sys.stdout.write(name + "\n")
    sys.stdout.flush()
    loop.run_until_complete(bed.close())


# --- the figures ------------------------------------------------------------------------------------------


def figures(counts: Mapping[str, Profile]) -> dict[str, dict[str, int]]:
    """Instructions of one request or event of each of `KINDS`, in all and by what executed them, from the profiles of
    `serve` by their names."""
    per_request = {name: _share(counts[name], COUNTED) for name in ("small prompt", "4 KB, half known", "4 KB, known")}
    streams = _share(counts["streams"], STREAMS * EVENTS)
    for kind in ("paced", "unpaced"):
        events = _share(counts[kind], STREAMS * EVENTS)
        per_request[f"event, {kind}"] = {name: events[name] - streams[name] for name in events}
    return per_request


def _share(profile: Profile, times: int) -> dict[str, int]:
    shares = dict.fromkeys(("all", *LIBRARIES, OTHER), 0.0)
    shares["all"] = profile.instructions / times
    for library, instructions in profile.by_library.items():
        name = next((name for name, begins in LIBRARIES.items() if library.startswith(begins)), OTHER)
        shares[name] += instructions / times
    return {name: round(value) for name, value in shares.items()}


def stages(counts: Mapping[str, Profile]) -> dict[str, dict[str, int]]:
    """Instructions of the stages of a request, for the kinds of which `serve` counts them."""
    found = {}
    for kind in ("small prompt", "4 KB, known"):
        taken = {
            stage: counts[f"{kind}: {stage}"].instructions / COUNTED for stage in ("HTTP", "prompt", "choice", "ledger")
        }
        rest = counts[kind].instructions / COUNTED - taken["HTTP"] - taken["ledger"]
        found[kind] = {
            "reading HTTP": round(taken["HTTP"]),
            "reading the prompt": round(taken["prompt"]),
            "choosing": round(taken["choice"] - taken["prompt"]),
            "accounting": round(taken["ledger"] - taken["choice"]),
            "everything else": round(rest),
        }
    return found


def regressions(measured: Mapping[str, int], committed: Mapping[str, int], limit: float = LIMIT) -> list[str]:
    """What takes over `limit` more instructions than the committed figures say, in words, and what has no figure on one
    of the two sides."""
    found = [f"{name}: measured, but not committed" for name in measured if name not in committed]
    for name, before in committed.items():
        now = measured.get(name)
        if now is None:
            found.append(f"{name}: committed, but not measured")
        elif now > before * (1 + limit):
            found.append(f"{name}: {now:,} instructions, {now / before - 1:+.0%} of the {before:,} committed")
    return found


def measure() -> dict[str, Any]:
    """All figures. Raises `CountingError`."""
    taken, output = profiles(["-m", "bench.micro.request", "--serve"])
    names = output.splitlines()
    if len(names) != len(taken):
        raise CountingError(f"{len(taken)} counts for {len(names)} names")
    counts = dict(zip(names, taken, strict=True))
    return {"build": build(), "instructions": figures(counts), "stages": stages(counts)}


def _print(measured: Mapping[str, Any]) -> None:
    console = Console()
    by_kind: Mapping[str, Mapping[str, int]] = measured["instructions"]
    table = Table(
        "", *(Column(kind, justify="right") for kind in by_kind), title="Thousands of instructions, by library"
    )
    for row in next(iter(by_kind.values())):
        table.add_row(row, *(f"{of_kind[row] / 1000:,.1f}" for of_kind in by_kind.values()))
    console.print(table)
    by_stage: Mapping[str, Mapping[str, int]] = measured["stages"]
    table = Table(
        "", *(Column(kind, justify="right") for kind in by_stage), title="Thousands of instructions, by stage"
    )
    for row in next(iter(by_stage.values())):
        table.add_row(row, *(f"{of_kind[row] / 1000:,.1f}" for of_kind in by_stage.values()))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if more instructions are executed than are committed."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.request", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--check", action="store_true", help="compare with the committed figures")
    parser.add_argument("--write", action="store_true", help="commit these figures")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve()
        return 0
    try:
        measured = measure()
    except CountingError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(measured, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        _print(measured)
    totals = {kind: shares["all"] for kind, shares in measured["instructions"].items()}
    committed = orjson.loads(BASELINE.read_bytes()) if BASELINE.exists() else {}
    if options.write:
        committed[measured["build"]] = totals
        BASELINE.write_bytes(orjson.dumps(committed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if options.check:
        if (of_build := committed.get(measured["build"])) is None:
            known = ", ".join(committed) or "none"
            sys.stderr.write(f"no figures are committed for {measured['build']} (only for: {known}); see --write\n")
            return 2
        found = regressions(totals, of_build)
        sys.stderr.write("".join(f"{line}\n" for line in found))
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
