"""What clients lose when a part fails behind Envoy, under load: `python -m bench.faults [NAME ...] [--json]`.

Each case starts a local cluster whose data plane is Envoy (extra `envoy`), sends requests over several connections,
every second of them a stream, breaks something in the middle, and counts: requests that failed before their first byte,
answers that were cut after it, and the longest wait for a first byte. For `picker certificate` a gateway of its own, in
full duplex, asks the picker over TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from bench.gateway import Listener, Picker, gateway_config
from runtime.envoy.binary import envoy_binary
from runtime.sockets import listen
from runtime.tls import self_signed

CONNECTIONS = 16
BEFORE, AFTER = 2.0, 4.0
"""Seconds of load before and after what happens."""
FROZEN = 3.0
WORKERS = 3
SPEED = 20.0
"""Of the emulated engines."""
PROMPT = "The quick brown fox jumps over the lazy dog. " * 90
PATIENCE = 60.0


@dataclass
class Counts:
    """What clients saw."""

    requests: int = 0
    failed: int = 0
    """Without a first byte."""
    cut: int = 0
    """After it."""
    longest: float = 0.0
    """Seconds that the first byte of an answer took."""
    why: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients that ask one after another, each over a connection that it keeps as long as the server does."""

    def __init__(self, url: str, *, reconnect: bool = False) -> None:
        self.counts = Counts()
        self._url = url
        self._ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._reconnect = reconnect

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(CONNECTIONS)]
        await asyncio.sleep(BEFORE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(AFTER)
        await self.end()

    async def end(self) -> None:
        self._ended.set()
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connector = aiohttp.TCPConnector(limit=1, ssl=trusting, force_close=self._reconnect)
        async with aiohttp.ClientSession(connector=connector) as session:
            turn = number
            while not self._ended.is_set():
                turn += 1
                await self._ask(session, turn)

    async def _ask(self, session: aiohttp.ClientSession, turn: int) -> None:
        counts, began, first = self.counts, time.monotonic(), False
        body = {"prompt": f"{turn} {PROMPT}", "max_tokens": 16, "stream": turn % 2 == 0}
        counts.requests += 1
        try:
            async with session.post(f"{self._url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    counts.failed += 1
                    counts.why[f"status {answer.status}"] += 1
                    return
                async for _ in answer.content.iter_any():
                    if not first:
                        first = True
                        counts.longest = max(counts.longest, time.monotonic() - began)
        except aiohttp.ClientConnectorError:
            counts.failed += 1
            counts.why["connection refused"] += 1
            await asyncio.sleep(0.05)
        except (aiohttp.ClientError, OSError) as error:
            counts.cut += first
            counts.failed += not first
            counts.why[type(error).__name__ + (" after the first byte" if first else "")] += 1


class Up:
    """A running `kvcluster up`."""

    def __init__(self, process: asyncio.subprocess.Process, ready: Mapping[str, Any], certificates: Path) -> None:
        self.process = process
        self.certificates = certificates
        self.url: str = ready["url"]
        self.folder = Path(ready["envoy_admin"]).parent
        self._states: dict[str, tuple[str, int | None]] = {}
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Read what it says of its processes."""
        assert self.process.stdout is not None  # noqa: S101  it is a pipe
        while line := await self.process.stdout.readline():
            event = json.loads(line)
            if event["event"] == "process":
                self.note(event)

    def note(self, event: Mapping[str, Any]) -> None:
        self._states[event["name"]] = (event["state"], event["pid"])
        self._changed.set()

    def pid(self, name: str) -> int:
        found = self._states[name][1]
        if found is None:
            raise RuntimeError(f"{name} does not run")
        return found

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    async def again(self, name: str, before: int) -> None:
        """Until it is ready with another process id."""
        async with asyncio.timeout(PATIENCE):
            while self._states[name][0] != "ready" or self._states[name][1] == before:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def up(folder: Path, certificates: Path, env: Mapping[str, str]) -> AsyncIterator[Up]:
    manifest = {
        "apiVersion": "kvcluster.dev/v1alpha1",
        "kind": "KVCluster",
        "metadata": {"name": "faults"},
        "spec": {
            "engine": {"speed": SPEED},
            "workers": {"replicas": WORKERS},
            "router": {
                "dataPlane": "envoy",
                "env": [{"name": name, "value": value} for name, value in env.items()],
            },
        },
    }
    file = folder / "faults.yaml"
    file.write_text(json.dumps(manifest))
    command = ("up", str(file), "--port", "0", "--management-port", "0", "--json", "--log-dir", str(folder / "logs"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvcluster", *command), stdout=asyncio.subprocess.PIPE, limit=2**20
    )
    assert process.stdout is not None  # noqa: S101  it is a pipe
    try:
        seen = []
        while True:
            line = await process.stdout.readline()
            if not line:
                raise SystemExit("kvcluster up did not start")
            seen.append(event := json.loads(line))
            if event["event"] == "ready":
                break
        cluster = Up(process, event, certificates)
        for each in seen:
            if each["event"] == "process":
                cluster.note(each)
        following = asyncio.create_task(cluster.follow())
        yield cluster
        following.cancel()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.wait()


# --- what happens ---------------------------------------------------------------------------------------


async def worker_killed(cluster: Up, _: Load) -> None:
    before = cluster.pid("faults-worker-0")
    cluster.kill("faults-worker-0")
    await cluster.again("faults-worker-0", before)


async def router_killed(cluster: Up, _: Load) -> None:
    before = cluster.pid("faults-router")
    cluster.kill("faults-router")
    await cluster.again("faults-router", before)


async def router_frozen(cluster: Up, _: Load) -> None:
    cluster.kill("faults-router", signal.SIGSTOP)
    await asyncio.sleep(FROZEN)
    cluster.kill("faults-router", signal.SIGCONT)


async def router_restarted(cluster: Up, _: Load) -> None:
    before = cluster.pid("faults-router")
    cluster.kill("faults-router", signal.SIGTERM)
    await cluster.again("faults-router", before)


async def envoy_killed(cluster: Up, _: Load) -> None:
    before = cluster.pid("faults-envoy")
    cluster.kill("faults-envoy")
    await cluster.again("faults-envoy", before)


async def envoy_restarted(cluster: Up, _: Load) -> None:
    """A second Envoy takes over while the first is drained and started anew, and gives back."""
    second = json.loads((cluster.folder / "envoy.json").read_text())
    second["admin"]["address"]["pipe"]["path"] = str(cluster.folder / "second.sock")
    config = cluster.folder / "second.json"
    config.write_text(json.dumps(second))
    async with _envoy(config, cluster.folder / "second.sock") as beside:
        await asyncio.sleep(1.0)
        before = cluster.pid("faults-envoy")
        await _drained(cluster.folder / "admin.sock")
        cluster.kill("faults-envoy", signal.SIGTERM)
        await cluster.again("faults-envoy", before)
        await asyncio.sleep(1.0)
        await _drained(cluster.folder / "second.sock")
        beside.terminate()


async def stopped(cluster: Up, load: Load) -> None:
    """Ctrl-C. Clients ask until they are refused."""
    cluster.process.send_signal(signal.SIGINT)
    await cluster.process.wait()
    await load.end()


async def certificate_rotated(cluster: Up, _: Load) -> None:
    before = await _certificate(cluster.url)
    _write_pair(cluster.certificates, "second")
    async with asyncio.timeout(PATIENCE):
        while await _certificate(cluster.url) == before:  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(0.1)


CASES: Mapping[str, Callable[[Up, Load], Awaitable[None]]] = {
    "worker killed": worker_killed,
    "router killed": router_killed,
    "router frozen": router_frozen,
    "router restarted": router_restarted,
    "Envoy restarted": envoy_restarted,
    "Envoy killed": envoy_killed,
    "certificate": certificate_rotated,
    "Ctrl-C": stopped,
}
PICKER_CERTIFICATE = "picker certificate"


async def case(name: str, folder: Path) -> Counts:
    """One of `CASES`, under load."""
    certificates = folder / "certificates"
    certificates.mkdir()
    _write_pair(certificates, "first")
    tls = name == "certificate"
    async with up(folder, certificates, {"ROUTER_TLS_CERT_PATH": str(certificates)} if tls else {}) as cluster:
        async with Load(cluster.url, reconnect=tls) as load:
            await CASES[name](cluster, load)
        return load.counts


async def picker_certificate(folder: Path) -> Counts:
    """The picker's certificate is replaced while a gateway in full duplex asks it, over ever new connections."""
    certificates = folder / "certificates"
    certificates.mkdir()
    _write_pair(certificates, "first")
    port, asked, management, *workers = _free_ports(3 + WORKERS)
    listeners, pickers = {port: Listener("picker")}, {"picker": Picker(asked, tls=True, requests=20)}
    config = folder / "gateway.json"
    config.write_text(json.dumps(gateway_config(listeners, pickers, workers)))
    async with contextlib.AsyncExitStack() as stack:
        for each in workers:
            await stack.enter_async_context(
                _process("-m", "worker.main", "--port", each, "--speed", SPEED, "--log-level", "error")
            )
        urls = ",".join(f"http://127.0.0.1:{each}" for each in workers)
        await stack.enter_async_context(
            _process(
                "-m", "router.main", "--mode", "picker", "--picker-host", "127.0.0.1", "--picker-port", asked,
                "--picker-health-port", -1, "--management-host", "127.0.0.1", "--management-port", management,
                "--cert-path", certificates, "--workers", urls, "--log-level", "error",
            )
        )  # fmt: skip
        await stack.enter_async_context(_envoy(config, None))
        url = f"http://127.0.0.1:{port}"
        await _until_answered(url)
        async with Load(url) as load:
            served = f"https://127.0.0.1:{asked}"
            before = await _certificate(served)
            for name in ("second", "third"):
                _write_pair(certificates, name)
                async with asyncio.timeout(PATIENCE):
                    while (now := await _certificate(served)) == before:  # noqa: ASYNC110  as above
                        await asyncio.sleep(0.1)
                before = now
        return load.counts


# --- parts ----------------------------------------------------------------------------------------------


def _write_pair(folder: Path, name: str) -> None:
    """A certificate and its key, as a Secret is replaced: both at once, by a link that is moved."""
    pair = self_signed(name)
    version = folder / f"..{name}"
    version.mkdir()
    (version / "tls.crt").write_bytes(pair.certificate)
    (version / "tls.key").write_bytes(pair.key)
    link = folder / "..new"
    link.symlink_to(version.name)
    link.replace(folder / "..data")
    for file in ("tls.crt", "tls.key"):
        if not (folder / file).is_symlink():
            (folder / file).symlink_to(f"..data/{file}")


async def _certificate(url: str) -> bytes:
    """What a server shows, in DER."""
    host, _, port = url.rpartition("/")[2].partition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return shown


@asynccontextmanager
async def _process(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process, until the block is left."""
    process = await asyncio.create_subprocess_exec(sys.executable, *map(str, arguments))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def _envoy(config: Path, admin: Path | None) -> AsyncIterator[asyncio.subprocess.Process]:
    """An Envoy that is ready, until the block is left."""
    process = await asyncio.create_subprocess_exec(
        *(str(envoy_binary()), "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart"),
        *("--log-level", "error", "--drain-time-s", "1", "--drain-strategy", "immediate"),
    )
    try:
        if admin is not None:
            async with asyncio.timeout(PATIENCE):
                while await _admin(admin, "GET", "/ready") != 200:  # noqa: ASYNC110  as above
                    await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _admin(socket: Path, method: str, path: str) -> int:
    """Status that Envoy's administration interface answers; 0: it does not answer."""
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
            session.request(method, f"http://envoy{path}") as answer,
        ):
            return answer.status
    except (aiohttp.ClientError, OSError):
        return 0


async def _drained(socket: Path) -> None:
    await _admin(socket, "POST", "/drain_listeners?graceful")
    await asyncio.sleep(2.0)


async def _until_answered(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1}) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        return [held.enter_context(listen("127.0.0.1", 0)).getsockname()[1] for _ in range(count)]


async def measure(names: Sequence[str]) -> dict[str, Counts]:
    counted = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="kvcluster-") as folder:
            run = picker_certificate(Path(folder)) if name == PICKER_CERTIFICATE else case(name, Path(folder))
            counted[name] = await run
    return counted


def main(argv: Sequence[str] | None = None) -> None:
    names = [*CASES, PICKER_CERTIFICATE]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases; default: all of {', '.join(names)}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(names):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    counted = uvloop.run(measure(options.names or names))
    if options.json:
        sys.stdout.write(json.dumps({name: asdict(counts) for name, counts in counted.items()}) + "\n")
        return
    table = Table("case", "requests", "failed without a first byte", "cut after it", "longest wait (s)", "how")
    for name, counts in counted.items():
        why = ", ".join(f"{number} {cause}" for cause, number in counts.why.most_common())
        cells = (counts.requests, counts.failed, counts.cut, f"{counts.longest:.2f}", why)
        table.add_row(name, *map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
