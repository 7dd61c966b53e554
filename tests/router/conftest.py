"""A whole router in the test's own event loop, in front of workers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.assembly import MANAGEMENT_LIMITS, Router, http_limits
from router.discovery.sources import Discovery, StaticDiscovery
from router.server.tracing import Tracing
from router.settings import Settings
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.router.fakes import FakeWorker


@dataclass
class MovedClock:
    """A clock that stands still until a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class RunningRouter:
    """One router and clients of its two ports."""

    router: Router
    data: HttpServer
    client: httpx.AsyncClient
    management: httpx.AsyncClient

    async def complete(self, prompt: Any = "a prompt", **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, **fields})

    async def stream(self, prompt: Any = "a prompt", **fields: Any) -> bytes:
        return (await self.complete(prompt, stream=True, **fields)).content

    @asynccontextmanager
    async def streaming(self, prompt: Any = "a prompt", **fields: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of a streamed answer, as they come."""
        request = {"prompt": prompt, "max_tokens": 2, "stream": True, **fields}
        async with self.client.stream("POST", "/v1/completions", json=request) as response:
            yield response.aiter_raw()

    async def leave_once(self, condition: Callable[[], bool]) -> None:
        """Ask for a stream, and close the connection once the condition holds."""
        async with http_client(self.data.port) as client:
            asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "stream": True}))
            await until(condition)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that carry these labels."""
        return sum(
            sample.value
            for family in self.router.registry.collect()
            for sample in family.samples
            if sample.name == f"kvcluster_router_{name}" and labels.items() <= sample.labels.items()
        )

    def nothing_held(self) -> bool:
        """No request is with a worker, as far as any count in the router says."""
        statuses = self.router.fleet.workers(self.router.clock())
        return len(self.router.in_flight) == 0 and all(status.in_flight == 0 for status in statuses)

    async def ticked(self) -> None:
        """Wait until the router has ended what its clock says is over."""
        ticks = self.metric("loop_lag_seconds_count")
        await until(lambda: self.metric("loop_lag_seconds_count") > ticks)

    async def silence(self, clock: MovedClock, alive: Iterable[FakeWorker] = (), seconds: float = 100.0) -> None:
        """Let twice so many seconds pass, in which these workers alone give signs of life. Twice, because a worker
        that was not heard from for as long as the router itself was held up gets one more period."""
        for _ in range(2):
            clock.now += seconds
            for worker in alive:
                self.router.fleet.mark_alive(worker.url, clock.now)
            await self.ticked()

    async def ready(self, workers: int) -> None:
        """Wait until so many workers are candidates."""
        await until(lambda: self.candidates() == workers)

    def candidates(self) -> int:
        return sum(status.ready for status in self.router.fleet.workers(self.router.clock()))


def http_client(port: int) -> httpx.AsyncClient:
    """A client of one port. Reading the certificates that TLS would need takes longer than most tests."""
    no_certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=90, verify=no_certificates)


DEFAULTS = {
    # In turn, unless a test is about the choice itself: the first request goes to the first worker.
    "routing_strategy": "round_robin",
    "retry_deadline": 0.3,
    # A machine that is busy with other work is no reason to find a worker silent or a view old.
    "connect_timeout": 60.0,
    "liveness_timeout": 60.0,
    "view_timeout": 60.0,
}
"""Settings of routers, where a test gives no others."""
StartRouter = Callable[..., AbstractAsyncContextManager[RunningRouter]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):  # a hang, and not a slow machine
        while not condition():  # noqa: ASYNC110  # nothing to wait on: the condition is a count
            await asyncio.sleep(0.002)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture
def start_router(tokenizer: Tokenizer) -> StartRouter:
    """`async with start_router(workers, strategy="round_robin") as router`; it waits until the workers are ready."""
    return router_starter(tokenizer)


def router_starter(tokenizer: Tokenizer) -> StartRouter:
    """Starts routers with this tokenizer."""

    @asynccontextmanager
    async def start(
        workers: Any = (),
        *,
        ready: int | None = None,
        source: Discovery | None = None,
        load: Callable[[str], Tokenizer] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> AsyncIterator[RunningRouter]:
        chosen = Settings(**{**DEFAULTS, **settings})
        router = Router(
            chosen,
            source or StaticDiscovery([worker.url for worker in workers]),
            load or load_tokenizer,
            clock,
            tracing,
        )
        if load is None:
            router.tokenizer.loaded(tokenizer)
        data = HttpServer(
            None,
            listen("127.0.0.1", 0),
            http_limits(chosen),
            cancel_on_disconnect=True,
            on_refusal=router.refused,
            refusal_headers=router.cors.headers,
            screen=router.data_plane.screen,
            handler=router.data_plane,
            tls=router.tls_port(),
        )
        management = HttpServer(
            router.management_app(), listen("127.0.0.1", 0), MANAGEMENT_LIMITS, screen=router.screen_management
        )
        router.start()
        await data.start()
        await management.start()
        try:
            async with (
                http_client(data.port) as client,
                http_client(management.port) as manager,
            ):
                running = RunningRouter(router, data, client, manager)
                await running.ready(len(workers) if ready is None else ready)
                yield running
                await until(running.nothing_held)
        finally:
            await data.stop(0)
            await management.stop(0)
            await router.close()

    return start
