"""Real engines that die of a request, freeze in the middle of one, or leave while they are the last."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from tests.processes import eventually
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.real import RealWorker, real_workers

pytestmark = pytest.mark.process


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
    """Frozen for longer than the liveness timeout, with the default settings."""
    async with real_workers(2, speed=1.0) as workers, start_router(workers, ready=0) as router:
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
