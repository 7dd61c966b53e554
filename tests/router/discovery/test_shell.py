"""The loop around the list and the watch, in virtual time.

Covered: what is asked when, what is told, what is logged. Not covered: the state machine by itself
(tests/runtime/kube/test_listwatch.py), connections (test_kubernetes.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.kubernetes import KubernetesDiscovery
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.runtime.kube.objects import bookmark, event, listing

pytestmark = pytest.mark.looptime

ONE = endpoint_slice("a", endpoint("10.0.0.1", "w-1"))
TWO = endpoint_slice("b", endpoint("10.0.0.2", "w-2"))
URLS = ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Stream:
    """One watch: it brings what is put in, and ends when its time is over, as the API server does."""

    until: float
    silent: bool
    slack: float
    events: asyncio.Queue[object] = field(default_factory=asyncio.Queue)
    closed: bool = False

    async def next(self) -> object | None:
        assert not self.closed
        try:
            async with asyncio.timeout_at(self.until + (self.slack if self.silent else 0.0)):
                found = await self.events.get()
        except TimeoutError:
            if self.silent:
                raise KubeApiError.of(ApiFailureCause.SILENT, "silence") from None
            return None
        if isinstance(found, KubeApiError):
            raise found
        return found

    def close(self) -> None:
        self.closed = True


@dataclass
class Api:
    """An API server in memory. While `down` is set every question fails with it."""

    slices: list[dict[str, Any]]
    namespace: str = "ns"
    service: str = "workers"
    version: int = 1
    down: KubeApiError | None = None
    watch_fails: KubeApiError | None = None
    silent: bool = False
    lists: list[float] = field(default_factory=list)
    watches: list[tuple[float, str]] = field(default_factory=list)
    stream: Stream | None = None
    closed: bool = False

    async def list(self) -> object:
        self.lists.append(now())
        if self.down is not None:
            raise self.down
        return listing(*self.slices, version=self.version)

    async def watch(self, watch: Watch, slack: float) -> Stream:
        self.watches.append((now(), watch.version))
        if failure := self.down or self.watch_fails:
            raise failure
        self.stream = Stream(now() + watch.seconds, self.silent, slack)
        return self.stream

    async def close(self) -> None:
        self.closed = True

    def send(self, found: object) -> None:
        assert self.stream is not None
        self.stream.events.put_nowait(found)


@asynccontextmanager
async def following(api: Api) -> AsyncIterator[tuple[KubernetesDiscovery, list[DiscoveredWorkers]]]:
    """A discovery that follows `api`, and what it has told so far."""
    discovery = KubernetesDiscovery(api, chance=lambda: 0.5, clock=now)
    told: list[DiscoveredWorkers] = []

    async def follow() -> None:
        async for workers in discovery.watch():
            told.append(workers)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    try:
        yield discovery, told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert api.closed
        assert api.stream is None or api.stream.closed


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


async def test_changes_are_told_and_what_changes_nothing_is_not() -> None:
    api = Api([ONE])
    async with following(api) as (discovery, told):
        assert [list(each) for each in told] == [URLS[:1]]
        api.send(bookmark(2))
        api.send(event("MODIFIED", ONE, 3))
        api.send(event("ADDED", TWO, 4))
        await asyncio.sleep(1.0)
        assert [list(each) for each in told] == [URLS[:1], URLS]
        api.send(event("DELETED", ONE, 5))
        await asyncio.sleep(1.0)
        assert list(told[-1]) == URLS[1:]
        assert discovery.status().public() == {
            "source": "kubernetes",
            "healthy": True,
            "age_seconds": pytest.approx(1.0),
            "error": "",
        }


HOURS = 6


async def test_hours_without_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = Api([ONE])
    async with following(api) as (discovery, told):
        for _ in range(HOURS * 60):
            await asyncio.sleep(60.0)
            assert discovery.status().healthy
        assert len(told) == 1
        assert HOURS * 60 / 6 < len(api.lists) < HOURS * 60 / 5
        assert len(api.watches) < HOURS * 3600 / 10
        assert discovery.status().failures == {}
    assert logged(caplog) == ["workers_listed"]


async def test_a_deletion_that_no_event_told_of_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    api = Api([ONE, TWO])
    async with following(api) as (_, told):
        api.slices.remove(ONE)
        await asyncio.sleep(400.0)
        assert [list(each) for each in told] == [URLS, URLS[1:]]


async def test_a_watch_that_goes_silent_is_dropped_and_the_list_stays(caplog: pytest.LogCaptureFixture) -> None:
    api = Api([ONE], silent=True)
    async with following(api) as (discovery, told):
        await asyncio.sleep(14.0)
        assert len(api.watches) == 1
        await asyncio.sleep(6.0)
        assert [version for _, version in api.watches] == ["1", "1"]
        assert discovery.status().failures == {"silent": 1}
        assert len(told) == 1


async def test_an_api_server_that_is_away_is_said_twice_and_its_return_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = Api([ONE])
    async with following(api) as (discovery, told):
        refused = api.down = KubeApiError.of(ApiFailureCause.CONNECT, "connection refused")
        api.send(KubeApiError.of(ApiFailureCause.CUT, "reset"))
        await asyncio.sleep(59.0)
        assert discovery.status().healthy
        assert discovery.status().error == "connection refused"
        assert logged(caplog) == ["workers_listed", "discovery_lost"]
        await asyncio.sleep(600.0)
        status = discovery.status()
        assert (status.healthy, status.known) == (False, True)
        assert status.age == pytest.approx(659.0, abs=1.0)
        assert status.failures["connect"] == status.failures.total() - 1  # type: ignore[attr-defined]
        assert 120 < status.failures["connect"] < 200
        assert logged(caplog) == ["workers_listed", "discovery_lost", "discovery_stale"]
        assert refused is api.down
        assert len(told) == 1
        api.down, api.slices = None, [TWO]
        await asyncio.sleep(7.0)
        assert list(told[-1]) == URLS[1:]
        assert discovery.status().public()["healthy"] is True
        assert discovery.status().error == ""
        assert logged(caplog)[3:] == ["discovery_restored"]
        assert discovery.status().relists == {"failures": 1}


async def test_a_router_that_may_list_but_not_watch_lists_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    api = Api([ONE], watch_fails=KubeApiError.of(ApiFailureCause.FORBIDDEN, "may not watch"))
    async with following(api) as (discovery, told):
        await asyncio.sleep(100.0)
        api.slices.append(TWO)
        await asyncio.sleep(6.0)
        assert list(told[-1]) == URLS
        assert discovery.status().healthy
        assert discovery.status().error == "may not watch"
        assert len(api.lists) < 45
        assert logged(caplog).count("discovery_lost") == 1


async def test_before_the_first_list_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    api = Api([ONE], down=KubeApiError.of(ApiFailureCause.FORBIDDEN, "may not list"))
    async with following(api) as (discovery, told):
        await asyncio.sleep(100.0)
        status = discovery.status()
        assert (status.known, status.healthy, status.age, status.error) == (False, False, None, "may not list")
        assert told == []
        assert logged(caplog) == ["discovery_lost"]
        api.down = None
        await asyncio.sleep(15.0)
        assert discovery.status().known
        assert len(told) == 1
        assert discovery.status().relists == {}


async def test_an_api_server_that_asks_for_patience_gets_it() -> None:
    api = Api([ONE])
    async with following(api) as (discovery, _):
        api.down = KubeApiError(429, "TooManyRequests", "later", 20.0)
        api.send(KubeApiError.of(ApiFailureCause.CUT, "reset"))
        await asyncio.sleep(15.0)
        assert [len(api.lists), len(api.watches)] == [1, 2]
        await asyncio.sleep(10.0)
        assert [len(api.lists), len(api.watches)] == [2, 2]
        assert discovery.status().failures == {"cut": 1, "throttled": 2}


async def test_a_single_cut_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = Api([ONE])
    async with following(api) as (discovery, _):
        api.send(KubeApiError.of(ApiFailureCause.CUT, "reset"))
        await asyncio.sleep(5.0)
        assert discovery.status().error == ""
        assert logged(caplog) == ["workers_listed"]
        assert len(api.lists) == 1


async def test_expired_positions_list_again_at_once_but_not_in_a_hot_loop() -> None:
    api = Api([ONE])
    async with following(api) as (discovery, told):
        gone = KubeApiError.of(ApiFailureCause.EXPIRED, "410")
        api.slices, api.version = [TWO], 9
        api.send(gone)
        await asyncio.sleep(0.01)
        assert list(told[-1]) == URLS[1:]
        assert api.watches[-1][1] == "9"
        await asyncio.sleep(5.0)
        api.watch_fails = gone
        api.send(gone)
        await asyncio.sleep(60.0)
        assert len(api.lists) < 25
        assert discovery.status().healthy


async def test_a_mistake_of_our_own_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Api):
        async def list(self) -> object:
            if not self.lists:
                self.lists.append(now())
                raise ZeroDivisionError
            return await super().list()

    async with following(Broken([ONE])) as (discovery, told):
        await asyncio.sleep(1.0)
        assert discovery.status().failures == {"unexpected": 1}
        assert len(told) == 1


async def test_a_service_without_workers_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async with following(Api([])) as (discovery, told):
        assert told == [{}]
        assert discovery.status().healthy
        assert logged(caplog) == ["no_workers_listed"]
