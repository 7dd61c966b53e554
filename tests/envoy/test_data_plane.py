"""Envoy as the routers' data plane, with a router process that decides: requests go on when it is frozen or killed.

Not covered: how Envoy is configured (tests/runtime/envoy), and the picker's decisions (test_picker.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.envoy.bootstrap import bootstrap, endpoints
from runtime.envoy.settings import Asking, DataPlane, Files
from tests.envoy.gateway import BINARY
from tests.processes import eventually, free_port
from tests.router.fakes import fake_workers, good

pytestmark = pytest.mark.envoy


@asynccontextmanager
async def running(log: Path, *command: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process, until the block is left."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def router_command(files: Files, urls: Sequence[str], management: int) -> list[object]:
    return [
        sys.executable, "-m", "router.main", "--mode=picker", f"--workers={','.join(urls)}", "--picker-port=-1",
        "--picker-health-port=-1", f"--picker-socket={files.picker}", f"--envoy-endpoints={files.endpoints}",
        f"--envoy-admin={files.admin}", "--management-host=127.0.0.1", f"--management-port={management}",
    ]  # fmt: skip


async def picks(client: httpx.AsyncClient) -> float:
    """How many requests the router has decided; 0 while it does not answer."""
    try:
        text = (await client.get("/metrics", timeout=5)).text
    except httpx.HTTPError:
        return 0.0
    lines = [line for line in text.splitlines() if line.startswith('kvcluster_router_picks_total{outcome="picked"')]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def test_requests_go_on_while_the_router_is_frozen_or_dead(tmp_path: Path) -> None:
    files = Files(*(str(tmp_path / name) for name in ("endpoints.json", "picker", "admin")))
    port, management = free_port(), free_port()
    async with fake_workers(good, good) as workers:
        urls = [worker.url for worker in workers]
        # The file as it is before the router has found a worker; nobody listens there.
        (tmp_path / "endpoints.json").write_text(json.dumps(endpoints(["127.0.0.1:1"], 0)))
        config = tmp_path / "envoy.json"
        plane = DataPlane(files, port, "127.0.0.1", asking=Asking(check_interval=0.1, check_timeout=0.3))
        config.write_text(json.dumps(bootstrap(plane)))
        envoy = [BINARY, "--config-path", config, "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"]
        command = router_command(files, urls, management)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{management}", trust_env=False) as router_client,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client,
        ):

            async def ask() -> Any:
                return await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})

            async def all_answered(number: int = 20) -> bool:
                return {(await each).status_code for each in [asyncio.create_task(ask()) for _ in range(number)]} == {
                    200
                }

            async def decides() -> bool:
                before = await picks(router_client)
                try:
                    return (await ask()).status_code == 200 and await picks(router_client) > before
                except httpx.TransportError:
                    return False

            going = asyncio.Event()

            async def keeps_asking() -> set[int]:
                going.set()
                seen = set()
                while going.is_set():
                    seen.add((await ask()).status_code)
                return seen

            async with running(tmp_path / "envoy.log", *envoy):
                async with running(tmp_path / "router.log", *command) as router:
                    await eventually(decides, "the router decides, and Envoy knows the workers")
                    assert await all_answered()
                    os.kill(router.pid, signal.SIGSTOP)
                    assert await all_answered(), "a frozen router costs no request"
                    assert await all_answered()
                    os.kill(router.pid, signal.SIGCONT)
                    await eventually(decides, "the router is asked again")
                    asked = asyncio.create_task(all_answered(50))
                    await eventually(lambda: len(client._transport._pool.connections) > 5, "requests are on their way")
                    router.kill()
                    await router.wait()
                    assert await asked, "the requests that it was deciding go on"
                    assert await all_answered(), "a dead router costs no request"
                asking = asyncio.create_task(keeps_asking())
                async with running(tmp_path / "router.log", *command):
                    await eventually(decides, "a new router is asked")
                    going.clear()
                    assert await asking == {200}, "a router that starts costs no request"
