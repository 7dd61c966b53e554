"""Real workers, each a process at an address of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.processes import free_port

HOST = "127.66.0.1"
"""Not the address from which connections are made: while a worker is away nobody else gets its port."""


class RealWorker:
    """`python -m worker.main` at an address of its own, whichever process is there now."""

    def __init__(self, speed: float = 20.0) -> None:
        self.port = free_port(HOST)
        self._speed = speed
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def start(self) -> None:
        flags = ("--host", HOST, "--port", str(self.port), "--speed", str(self._speed), "--log-level", "error")
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", "worker.main", *flags)

    async def drain(self) -> None:
        """SIGTERM, as a kubelet sends it, and wait for the end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert await self.process.wait() == 0

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def real_workers(count: int, speed: float = 20.0) -> AsyncIterator[list[RealWorker]]:
    async with AsyncExitStack() as stack:
        workers = [RealWorker(speed) for _ in range(count)]
        for worker in workers:
            stack.push_async_callback(worker.kill)
            await worker.start()
        yield workers
