"""Real workers that drain, go and come back while requests arrive: no client notices."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from tests.router.conftest import RunningRouter, StartRouter, until

pytestmark = pytest.mark.process


HOST = "127.66.0.1"
"""Not the address from which connections are made: while a worker is away nobody else gets its port."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


class RealWorker:
    """`python -m worker.main` at an address of its own, whichever process is there now."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def start(self) -> None:
        flags = ("--host", HOST, "--port", str(self.port), "--speed", "20", "--log-level", "error")
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", "worker.main", *flags)

    async def drain(self) -> None:
        """SIGTERM, as a kubelet sends it, and wait for the end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert await self.process.wait() == 0

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def real_workers(count: int) -> AsyncIterator[list[RealWorker]]:
    async with AsyncExitStack() as stack:
        workers = [RealWorker() for _ in range(count)]
        for worker in workers:
            stack.push_async_callback(worker.kill)
            await worker.start()
        yield workers


class Load:
    """Clients that ask one request after another, streams and others, until `stop`."""

    def __init__(self, router: RunningRouter, clients: int = 6) -> None:
        self.responses: list[httpx.Response] = []
        self._router = router
        self._ending = False
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(clients)]

    async def _client(self, number: int) -> None:
        while not self._ending:
            stream = number % 2 == 0
            response = await self._router.complete(f"client {number}", max_tokens=16, stream=stream, ignore_eos=True)
            self.responses.append(response)

    async def some(self, count: int = 20) -> None:
        """Wait until so many more requests were answered."""
        enough = len(self.responses) + count
        await until(lambda: len(self.responses) >= enough)

    async def stop(self) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)

    def failed(self) -> list[str]:
        """Answers that are not whole."""
        return [
            response.text
            for response in self.responses
            if response.status_code != 200 or '"error"' in response.text or '"abort"' in response.text
        ]


async def test_workers_restarted_one_after_another_lose_no_request(start_router: StartRouter) -> None:
    async with real_workers(2) as workers, start_router(workers, retry_deadline=20) as router:
        load = Load(router)
        for worker in workers:
            await load.some()
            await worker.drain()
            await load.some()
            await worker.start()
            await router.ready(2)
        await load.some()
        await load.stop()
        assert load.failed() == []


async def test_the_only_worker_restarted_makes_requests_wait(start_router: StartRouter) -> None:
    async with real_workers(1) as workers, start_router(workers, retry_deadline=20) as router:
        load = Load(router)
        await load.some()
        await workers[0].drain()
        await until(lambda: router.candidates() == 0)
        await workers[0].start()
        await load.some()
        await load.stop()
        assert load.failed() == []
