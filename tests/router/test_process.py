"""The router as a process: `python -m router.main`, signals, inherited sockets, exit codes.

Covered: start, SIGTERM with and without a drain delay, a restart on inherited sockets, errors at start, the last lines
and spans. Not covered: the rules of draining on virtual time (tests/runtime), pods in a cluster (tests/kube).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from runtime.sockets import listen
from tests.router.conftest import http_client, until
from tests.router.discovery.scripted import ScriptedApi
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.router.fakes import FakeWorker, completion, fake_workers, good, good_after
from tests.router.otlp import collecting

pytestmark = pytest.mark.process


@asynccontextmanager
async def router_process(
    *flags: str, fds: tuple[int, ...] = (), out: int = asyncio.subprocess.PIPE, **env: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router.main", *flags,
        env={**os.environ, **env}, pass_fds=fds, stdout=out, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def started(process: Process) -> tuple[int, int]:
    """Data and management port, from the line that says that the router serves."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while line := (await process.stderr.readline()).decode():
            if found := re.search(r"router_started .*\bport=(\d+) management_port=(\d+)", line):
                return int(found[1]), int(found[2])
    raise AssertionError("the router did not start")


LOOPBACK = ("--host", "127.0.0.1", "--port", "0", "--management-host", "127.0.0.1", "--management-port", "0")


async def readiness(client: httpx.AsyncClient, status: int) -> None:
    """Wait until GET /ready answers this status."""
    async with asyncio.timeout(30):
        while (await client.get("/ready")).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def draining(client: httpx.AsyncClient) -> None:
    """Wait until the router knows that it was told to stop."""
    async with asyncio.timeout(30):
        while not (await client.get("/status")).json()["draining"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def ready(management_port: int) -> None:
    async with http_client(management_port) as client:
        await readiness(client, 200)


async def test_by_itself_with_a_strategy_from_the_environment() -> None:
    async with (
        fake_workers(good) as (worker,),
        router_process(*LOOPBACK, "--workers", worker.url, ROUTING_STRATEGY="least_loaded") as process,
    ):
        port, management_port = await started(process)
        await ready(management_port)
        async with http_client(port) as client:
            response = await client.post("/v1/completions", json={"prompt": "x"})
        assert response.content == completion("Hello", cached=16)
        assert response.headers["x-kvcluster-strategy"] == "least_loaded"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_the_last_lines_and_spans_are_written_before_the_end() -> None:
    async with (
        collecting() as collector,
        fake_workers(good) as (worker,),
        router_process(
            *LOOPBACK, "--workers", worker.url, "--access-log", "json", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url
        ) as process,
    ):
        port, management_port = await started(process)
        await ready(management_port)
        async with http_client(port) as client:
            await client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
        assert collector.spans == []
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        lines = (await process.stdout.read()).splitlines()
        assert await process.wait() == 0
    assert [json.loads(line)["request_id"] for line in lines] == ["mine"]
    (span,) = collector.named("POST /v1/completions")
    assert parent(worker) == (span.trace_id.hex(), collector.named("attempt")[0].span_id.hex())


def parent(worker: FakeWorker) -> tuple[str, str]:
    """Trace and span that the worker's one request names."""
    (received,) = worker.received
    _, trace, span, _ = (received.header("traceparent") or "").split("-")
    return trace, span


async def test_sigterm_finishes_what_is_in_progress() -> None:
    release = asyncio.Event()
    async with (
        fake_workers(good_after(release)) as (worker,),
        router_process(*LOOPBACK, "--workers", worker.url) as process,
    ):
        port, management_port = await started(process)
        await ready(management_port)
        async with http_client(port) as client, http_client(management_port) as management:
            running = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
            await until(lambda: len(worker.received) == 1)
            process.send_signal(signal.SIGTERM)
            await readiness(management, 503)
            with pytest.raises(httpx.ConnectError):
                async with http_client(port) as late:
                    await late.get("/v1/models")
            release.set()
            response = await running
        assert response.status_code == 200
        assert response.headers["connection"] == "close"
        assert await process.wait() == 0


async def test_with_a_drain_delay_requests_are_taken_until_everybody_knows() -> None:
    async with (
        fake_workers(good) as (worker,),
        router_process(*LOOPBACK, "--workers", worker.url, "--drain-delay", "60") as process,
    ):
        port, management_port = await started(process)
        await ready(management_port)
        async with http_client(port) as idle, http_client(management_port) as management:
            assert "connection" not in (await idle.post("/v1/completions", json={"prompt": "x"})).headers
            process.send_signal(signal.SIGTERM)
            await draining(management)
            # A Service without another endpoint goes on sending here, but only while this says that it is ready.
            assert (await management.get("/ready")).status_code == 200
            told = await idle.post("/v1/completions", json={"prompt": "x"})
            assert (told.status_code, told.headers["connection"]) == (200, "close")
            async with http_client(port) as late:
                answer = await late.post("/v1/completions", json={"prompt": "x"})
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            assert process.returncode is None
            process.send_signal(signal.SIGTERM)  # no need to wait for the rest of the delay
            assert await process.wait() == 0


async def test_a_client_that_keeps_its_connections_notices_nothing_of_a_drain() -> None:
    async with fake_workers(good) as (worker,):
        flags = (*LOOPBACK, "--workers", worker.url, "--drain-delay", "0.5")
        async with router_process(*flags) as process:
            port, management_port = await started(process)
            await ready(management_port)
            statuses: list[int] = []

            async def client() -> None:
                """Asks on one connection until it is told to leave it."""
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                body = b'{"prompt":"x"}'
                closing = False
                while not closing:
                    head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
                    writer.write(head + body)
                    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
                    statuses.append(int(answer.split()[1]))
                    await reader.readexactly(int(re.search(r"content-length: (\d+)", answer)[1]))  # type: ignore[index]
                    closing = "connection: close" in answer
                assert await reader.read() == b""
                writer.close()

            clients = [asyncio.create_task(client()) for _ in range(8)]
            await until(lambda: len(statuses) > 50)
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(*clients)
            assert set(statuses) == {200}
            assert await process.wait() == 0


async def test_workers_from_kubernetes(tmp_path: Path) -> None:
    async with fake_workers(good, good) as workers:
        api = ScriptedApi()
        await api.start()
        config = api.kubeconfig(tmp_path / "kubeconfig")
        env = {"ROUTER_KUBERNETES_SERVICE": "workers", "KUBECONFIG": str(config), "ROUTER_STRATEGY": "round_robin"}
        async with router_process(*LOOPBACK, **env) as process:
            port, management_port = await started(process)
            async with http_client(management_port) as management, http_client(port) as client:
                await readiness(management, 503)
                for number, worker in enumerate(workers):
                    made = endpoint("127.0.0.1", f"w-{number}")
                    await api.put(endpoint_slice(f"s{number}", made, ports=[{"name": "http", "port": worker.port}]))
                await readiness(management, 200)
                async with asyncio.timeout(30):
                    while len((await management.get("/workers")).json()["workers"]) < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
                await api.stop(reset=True)  # the router does not need it to serve
                assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
                page = (await management.get("/status")).json()
                assert page["discovery"]["source"] == "kubernetes"
                assert {w["pod"] for w in (await management.get("/workers")).json()["workers"]} == {"w-0", "w-1"}
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_a_restart_on_inherited_sockets_loses_no_connection_attempt() -> None:
    data, management = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
    fds = (data.fileno(), management.fileno())
    flags = ("--fd", str(fds[0]), "--management-fd", str(fds[1]))
    async with fake_workers(good) as (worker,), http_client(data.getsockname()[1]) as client:
        async with router_process(*flags, "--workers", worker.url, fds=fds) as first:
            await started(first)
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
            first.kill()
            await first.wait()
        waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
        async with router_process(*flags, "--workers", worker.url, fds=fds) as second:
            await started(second)
            # It came before any worker was known to be ready: it waited for one.
            assert (await waiting).status_code == 200
    data.close()
    management.close()


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--strategy", "magic"), 2, "unknown strategy 'magic'"),
        (("--fd", "0"), 1, "cannot listen"),
        (("--nonsense",), 2, "nonsense"),
        (("--kubernetes-service", "s", "--kubernetes-kubeconfig", "/none"), 2, "no kubeconfig /none"),
    ],
)
async def test_what_cannot_be_served_is_said_in_a_line(flags: tuple[str, ...], code: int, says: str) -> None:
    async with router_process(*LOOPBACK, *flags) as process:
        _, err = await process.communicate()
        assert process.returncode == code
        assert says in err.decode()
        assert "Traceback" not in err.decode()


async def test_a_router_outside_kubernetes_does_not_load_its_client() -> None:
    code = "import sys, router.main; sys.exit('kubernetes' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
