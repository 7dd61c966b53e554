"""The router in front of real worker processes: restarts, deaths and freezes that scripted workers cannot show.

Covered: rolling restarts under traffic, the only worker restarted, a request that kills its engine, a worker that is
frozen for a moment. Not covered: each kind of failure by itself (test_failures.py, test_retries.py), the router as a
process (test_process.py), whole clusters (tests/e2e).
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from tests.processes import eventually, free_port
from tests.router.conftest import RunningRouter, StartRouter, until

pytestmark = pytest.mark.process

HOST = "127.66.0.1"
"""Not the address from which connections are made: while a worker is away nobody else gets its port."""


class RealWorker:
    """`python -m worker.main` at an address of its own, whichever process is there now."""

    def __init__(self, speed: float = 20.0, *flags: str) -> None:
        self.port = free_port(HOST)
        self._flags = ("--speed", str(speed), *flags)
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def start(self) -> None:
        flags = ("--host", HOST, "--port", str(self.port), "--log-level", "error", *self._flags)
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


# --- restarts ---


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
    async with real_workers(2) as workers, start_router(workers, retry_deadline=60) as router:
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
    async with real_workers(1) as workers, start_router(workers, retry_deadline=60) as router:
        load = Load(router)
        await load.some()
        await workers[0].drain()
        await until(lambda: router.candidates() == 0)
        await workers[0].start()
        await load.some()
        await load.stop()
        assert load.failed() == []


# --- deaths and freezes ---


def busy(router: RunningRouter) -> set[str]:
    """Workers that have a request of the router."""
    return {status.url for status in router.router.fleet.workers(router.router.clock()) if status.in_flight}


async def computes(worker: RealWorker) -> bool:
    """Whether its engine has a request."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return bool((await client.get(f"{worker.url}/load")).json()["server_load"])


async def prompts_computed(worker: RealWorker) -> float:
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{worker.url}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_a_request_that_kills_its_engine_kills_two_of_four(start_router: StartRouter) -> None:
    async with real_workers(4, speed=1.0) as workers, start_router(workers, ready=0) as router:
        await eventually(lambda: router.candidates() == 4)
        asked = asyncio.create_task(router.complete("poison", max_tokens=2000, ignore_eos=True))
        killed: set[str] = set()
        while not asked.done():
            for worker in workers:
                if worker.url in busy(router) - killed and await computes(worker):
                    await worker.kill()  # as an engine that runs out of memory with this prompt
                    killed.add(worker.url)
            await asyncio.wait([asked], timeout=0.01)
        assert asked.result().status_code >= 500
        assert len(killed) == 2
        response = await router.complete("another", max_tokens=2)
        assert response.status_code == 200
        assert router.metric("retries_denied_total", why="suspect") == 1


async def test_a_worker_frozen_for_a_moment_computes_its_request_once(start_router: StartRouter) -> None:
    """Frozen for longer than the liveness timeout, which is the default one here."""
    async with (
        real_workers(2, speed=1.0) as workers,
        start_router(workers, ready=0, liveness_timeout=2.0) as router,
    ):
        await eventually(lambda: router.candidates() == 2)
        asked = asyncio.create_task(router.complete("x", max_tokens=200, ignore_eos=True))
        await until(lambda: len(busy(router)) == 1)
        (url,) = busy(router)
        frozen, other = sorted(workers, key=lambda worker: worker.url != url)
        frozen.signal(signal.SIGSTOP)
        try:
            await router.ready(1)
            assert not asked.done()
        finally:
            frozen.signal(signal.SIGCONT)
        response = await asked
        assert response.headers["x-kvcluster-attempts"] == "1"
        assert response.json()["usage"]["completion_tokens"] == 200
        assert await prompts_computed(other) == 0
        await router.ready(2)
