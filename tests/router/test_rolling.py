"""Real workers that drain, go and come back while requests arrive: no client notices."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.real import real_workers

pytestmark = pytest.mark.process


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
