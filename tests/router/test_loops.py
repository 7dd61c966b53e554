"""Every loop of the router that tries again: how often it does, on virtual time, while what it asks is away.

Besides connects the tests count how often the event loop goes round: a loop that spins without connecting costs a core
just the same. Covered: probes, feeds, the API server, the file of workers. Not covered: what the loops do with the
answers (test_feed.py, tests/router/discovery), and the tokenizer's retries (test_prompts.py).
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from kvcache.feed import MSGPACK, Load, Snapshot, WorkerInfo, encode_snapshot
from kvcache.keys import KEY_SCHEME
from router.core.fleet import Fleet
from router.discovery.discovered import DiscoveredWorker
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.sources import FileDiscovery
from router.metrics import Metrics
from router.sync.fleet_sync import FleetSync
from router.sync.liveness import Ticker
from router.upstream.in_flight import InFlight, UpstreamTimeouts
from router.upstream.pool import ConnectionPool
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from runtime.kube.reflector import EventStream
from tests.router.core.support import BLOCK, config
from tests.virtual import CountingLoop, run

URL = "http://worker:8000"
MINUTE = 60.0

Answer = Callable[[str], Awaitable[Any]]
"""From a path to an answer, or the error that asking raises."""


async def refuse(path: str) -> Any:
    """Nobody listens."""
    key = SimpleNamespace(host="worker", port=8000, ssl=None, is_ssl=False)
    raise aiohttp.ClientConnectorError(key, ConnectionRefusedError(errno.ECONNREFUSED, "refused"))  # type: ignore[arg-type]


def plain(status: int, content_type: str = "", body: bytes = b"") -> Any:
    """An answer, as aiohttp shows it."""

    async def readany() -> bytes:
        nonlocal body
        piece, body = body, b""
        return piece

    return SimpleNamespace(
        status=status,
        headers={},
        content_type=content_type,
        content=SimpleNamespace(readany=readany),
        url=SimpleNamespace(path="/"),
    )


class Session:
    """Counts what is asked, by path. It stands for aiohttp's session as far as the router's loops use it."""

    def __init__(self, loop: CountingLoop, answer: Answer) -> None:
        self.asked: defaultdict[str, list[float]] = defaultdict(list)
        self._loop = loop
        self._answer = answer

    def get(self, url: str, **_: Any) -> AbstractAsyncContextManager[Any]:
        @asynccontextmanager
        async def asking() -> AsyncIterator[Any]:
            path = url.removeprefix(URL)
            self.asked[path].append(self._loop.time())
            yield await self._answer(path)

        return asking()


class Shell:
    """The parts of a router that follow one worker, on virtual time."""

    def __init__(self, loop: CountingLoop, answer: Answer) -> None:
        self.loop = loop
        self.session = Session(loop, answer)
        metrics = Metrics(CollectorRegistry())
        self.fleet = Fleet(config())
        in_flight = InFlight(UpstreamTimeouts(answer=600, idle=600, stall=10, cut=60))
        self.fleet_sync = FleetSync(
            self.fleet, in_flight, ConnectionPool(connect_timeout=2), self.session,  # type: ignore[arg-type]
            metrics, clock=loop.time, rng=random.Random(1), changed=asyncio.Event(),
        )  # fmt: skip
        self.ticker = asyncio.create_task(
            Ticker(self.fleet, in_flight, metrics, loop.time, lambda url, why: None).run()
        )

    async def follow(self, seconds: float, each: Callable[[], None] | None = None, every: float = 1.0) -> None:
        """Follow the worker for so long; call `each` meanwhile."""
        self.fleet_sync.apply({URL: DiscoveredWorker()})
        end = self.loop.time() + seconds
        while self.loop.time() < end:
            await asyncio.sleep(every)
            if each is not None:
                each()
        await self.fleet_sync.stop()
        self.ticker.cancel()
        await asyncio.gather(self.ticker, return_exceptions=True)

    def asked(self, path: str) -> list[float]:
        return self.session.asked[path]


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def test_a_worker_that_refuses_connections_is_asked_once_a_second_at_most_and_ever_more_rarely() -> None:
    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, refuse)
        await shell.follow(MINUTE)
        between = gaps(shell.asked("/health"))
        assert between[:3] == pytest.approx([1.0, 2.0, 4.0])
        assert between[3:] == pytest.approx([5.0] * len(between[3:]))
        assert len(between) >= 10, "it is asked for as long as it is listed"
        assert len(shell.asked("/cache/state")) <= 2 * MINUTE
        assert loop.iterations < 20 * MINUTE

    run(main)


def test_requests_that_are_refused_do_not_make_it_more() -> None:
    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, refuse)
        await shell.follow(MINUTE, lambda: shell.fleet_sync.unreachable(URL, "refused"), every=0.01)
        assert len(shell.asked("/health")) <= 15

    run(main)


def test_a_worker_that_turns_everything_away_is_asked_for_its_health_twice_a_second_at_most() -> None:
    async def answer(path: str) -> Any:
        return plain(200 if path == "/health" else 404)

    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, answer)
        await shell.follow(MINUTE, lambda: shell.fleet_sync.busy(URL), every=0.01)
        assert MINUTE - 2 <= len(shell.asked("/health")) <= 2 * MINUTE + 2
        assert len(shell.asked("/cache/state")) <= 3, "one without a feed is asked for it twice a minute"

    run(main)


def test_a_worker_that_does_not_answer_is_asked_once_a_second() -> None:
    async def answer(path: str) -> Any:
        if path == "/health":
            raise TimeoutError
        raise aiohttp.ServerDisconnectedError

    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, answer)
        await shell.follow(MINUTE)
        assert len(shell.asked("/health")) <= MINUTE + 2
        assert len(shell.asked("/cache/state")) <= 2 * MINUTE

    run(main)


@pytest.mark.parametrize(
    "stream", [b"event: reset\ndata: {}\n\n", b"event: batch\ndata: garbage\n\n", b""], ids=["reset", "garbage", "ends"]
)
def test_a_feed_that_ends_at_once_is_asked_for_ever_more_rarely(stream: bytes) -> None:
    async def answer(path: str) -> Any:
        if path == "/cache/state":
            return plain(200, MSGPACK, SNAPSHOT)
        return plain(200, "text/event-stream", stream) if path == "/cache/events" else plain(200)

    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, answer)
        await shell.follow(MINUTE)
        for path in ("/cache/state", "/cache/events", "/health"):
            assert len(shell.asked(path)) <= 2.5 * MINUTE, path
        assert loop.iterations < 50 * MINUTE

    run(main)


SNAPSHOT = encode_snapshot(
    Snapshot(
        WorkerInfo("w", 1, "m", BLOCK, "f" * 32, KEY_SCHEME, 1000), 0, Load(total_blocks=1000, free_blocks=1000), ()
    ),
    MSGPACK,
)


async def live_feed(path: str) -> Any:
    """A worker whose feed says something every second."""
    if path == "/cache/state":
        return plain(200, MSGPACK, SNAPSHOT)
    answer = plain(200, "text/event-stream")

    async def readany() -> bytes:
        await asyncio.sleep(1.0)
        return b": keep-alive\n\n"

    answer.content.readany = readany
    return answer


def test_a_worker_whose_feed_shows_that_it_lives_is_asked_for_its_health_once_when_somebody_wants_to_know() -> None:
    async def main(loop: CountingLoop) -> None:
        shell = Shell(loop, live_feed)
        wanted_at = 10.0
        pending = [wanted_at]

        def ask() -> None:
            if pending and loop.time() >= pending[0]:
                pending.clear()
                shell.fleet_sync.busy(URL)

        await shell.follow(MINUTE, ask)
        later = [at for at in shell.asked("/health") if at >= wanted_at]
        assert len(later) == 1
        assert later[0] < wanted_at + 2.0

    run(main)


def test_a_worker_that_comes_back_is_asked_for_its_health_as_soon_as_its_feed_answers() -> None:
    """It turned requests away before it went: the process that listens there now may take them."""

    async def main(loop: CountingLoop) -> None:
        async def answer(path: str) -> Any:
            if loop.time() < 2.0:
                if path == "/health":
                    return plain(503)
                raise aiohttp.ServerDisconnectedError
            return await (refuse if loop.time() < MINUTE else live_feed)(path)

        shell = Shell(loop, answer)
        await shell.follow(MINUTE + 20.0)
        back_at = next(at for at in shell.asked("/cache/events") if at >= MINUTE)
        assert any(back_at <= at < back_at + 0.1 for at in shell.asked("/health"))

    run(main)


class Away:
    """An API server that fails at once, as `failure` says; `watches`: only once it was listed."""

    namespace = service = "x"

    def __init__(self, failure: ApiFailureCause, *, watches: bool) -> None:
        self.calls = 0
        self._failure = failure
        self._watches = watches

    async def list(self) -> object:
        self.calls += 1
        if self._watches:
            return {"kind": "EndpointSliceList", "metadata": {"resourceVersion": "1"}, "items": []}
        raise KubeApiError.of(self._failure, "away")

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        self.calls += 1
        raise KubeApiError.of(self._failure, "away")

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("watches", [False, True])
@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(ApiFailureCause.CONNECT, id="connect"),
        pytest.param(ApiFailureCause.FORBIDDEN, id="forbidden"),
        pytest.param(ApiFailureCause.EXPIRED, id="expired"),
        pytest.param(ApiFailureCause.CUT, id="cut"),
        pytest.param(ApiFailureCause.MALFORMED, id="malformed"),
    ],
)
def test_an_api_server_that_fails_at_once_is_asked_ever_more_rarely(failure: ApiFailureCause, watches: bool) -> None:
    async def main(loop: CountingLoop) -> None:
        api = Away(failure, watches=watches)
        discovery = KubernetesDiscovery(api, clock=loop.time, chance=lambda: 0.0)
        following = asyncio.create_task(_exhaust(discovery.watch()))
        await asyncio.sleep(MINUTE)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert 5 <= api.calls <= MINUTE
        assert loop.iterations < 10 * MINUTE

    run(main)


async def _exhaust(source: AsyncIterator[object]) -> None:
    async for _ in source:
        pass


def test_a_file_that_is_missing_is_looked_for_twice_a_second(tmp_path: Path) -> None:
    async def main(loop: CountingLoop) -> None:
        following = asyncio.create_task(_exhaust(FileDiscovery(tmp_path / "none", clock=loop.time).watch()))
        await asyncio.sleep(MINUTE)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert loop.iterations < 5 * MINUTE

    run(main)
