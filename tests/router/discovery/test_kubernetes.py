"""Discovery over real sockets, at an API server that a test scripts.

Covered: what is asked, that changes are followed, and each failure until it ends. Not covered: credentials,
connections, silent watches and errors within one (tests/runtime/kube), a whole API server (test_fake_cluster.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.kubernetes import KubernetesDiscovery, find_service
from runtime.backoff import Backoff
from runtime.kube.listwatch import ListWatchPolicy
from tests.router.conftest import until
from tests.router.discovery.scripted import ScriptedApi
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.runtime.kube.objects import bookmark, status

pytestmark = pytest.mark.process

QUICK = ListWatchPolicy(retry=Backoff(0.002, 0.01), settled=0.02)
ONE = endpoint_slice("a", endpoint("10.0.0.1", "w-1"))
TWO = endpoint_slice("b", endpoint("10.0.0.2", "w-2"))
URLS = ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]


@dataclass
class Followed:
    """An API server and a discovery that follows it."""

    api: ScriptedApi
    discovery: KubernetesDiscovery
    told: list[DiscoveredWorkers] = field(default_factory=list)

    async def knows(self, *urls: str) -> None:
        await until(lambda: bool(self.told) and list(self.told[-1]) == list(urls))

    async def watches(self, count: int = 1) -> None:
        await until(lambda: len(self.api.feeds) == count)

    async def failed(self, cause: str) -> None:
        await until(lambda: self.discovery.status().failures.get(cause, 0) > 0)


@asynccontextmanager
async def following(tmp_path: Path, *slices: object) -> AsyncIterator[Followed]:
    api = ScriptedApi()
    for made in slices:
        await api.put(made)  # type: ignore[arg-type]
    await api.start()
    connection = await find_service("workers", None, api.kubeconfig(tmp_path / "kubeconfig"))
    followed = Followed(api, KubernetesDiscovery(connection, policy=QUICK))

    async def follow() -> None:
        async for workers in followed.discovery.watch():
            followed.told.append(workers)

    task = asyncio.create_task(follow())
    try:
        yield followed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.stop()


async def test_what_is_asked(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.knows(*URLS[:1])
        await followed.watches()
        listed, watched = followed.api.questions
        path = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
        assert listed == {"path": path, "labelSelector": "kubernetes.io/service-name=workers"}
        assert 10 <= int(watched.pop("timeoutSeconds")) <= 14
        assert watched == {**listed, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "1"}
        assert followed.api.tokens == ["Bearer secret"] * 2


async def test_changes_are_followed(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO)
        await followed.knows(*URLS)
        await followed.api.say(bookmark(2))
        await followed.api.delete("a")
        await followed.knows(*URLS[1:])
        assert len(followed.api.questions) == 2


@pytest.mark.parametrize(
    "half", [b"", b'{"type":"ADDED","object":{"meta'], ids=["between two events", "in the middle of one"]
)
async def test_a_watch_that_is_cut_is_resumed_without_a_list(tmp_path: Path, half: bytes) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        await followed.api.say_bytes(half)
        followed.api.drop_feeds()
        await followed.knows(*URLS)
        assert followed.api.lists == 1
        assert followed.discovery.status().failures == {"cut": 1}


async def test_a_position_that_is_no_longer_kept_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        await followed.api.delete("a", told=False)
        followed.api.compacted = 3
        followed.api.drop_feeds()
        await followed.knows(*URLS[1:])
        assert followed.discovery.status().relists == {"expired": 1}


async def test_an_api_server_that_restarts_is_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.stop(reset=True)
        await followed.failed("connect")
        assert "cannot be reached" in followed.discovery.status().error
        assert list(followed.told[-1]) == URLS[:1]
        followed.api.feeds.clear()
        await followed.api.put(TWO)
        await followed.api.start()
        await followed.knows(*URLS)
        await until(lambda: "discovery_restored" in caplog.text)
        assert caplog.text.count("discovery_lost") == 1


@pytest.mark.parametrize(
    ("refusal", "cause", "says"),
    [
        ((401, status(401, "Unauthorized", "Unauthorized"), ""), "unauthorized", "401"),
        ((403, status(403, "Forbidden", "u cannot list"), ""), "forbidden", "grant list and watch"),
        ((429, status(429, "TooManyRequests", "too many"), ""), "throttled", "too many"),
        ((500, "no status", ""), "server_error", "500"),
        ((200, ["no list"], ""), "malformed", "no sense"),
        ((404, {"paths": []}, ""), "status", "404"),
    ],
    ids=["401", "403", "429", "500", "no-list", "404"],
)
async def test_refusals_are_named_and_repeated_until_they_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: tuple[int, object, str], cause: str, says: str
) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        followed.api.refusals = [refusal] * 3
        followed.api.drop_feeds()
        await followed.knows(*URLS)
        assert followed.discovery.status().failures[cause] >= 1
        (lost,) = [record for record in caplog.records if record.getMessage() == "discovery_lost"]
        assert says in vars(lost)["kvcluster_fields"]["why"]


async def test_garbage_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        for garbage in (b"{\n", b"[]\n", b'{"type":"ADDED","object":{}}\n', b"\xff" * 100 + b"\n"):
            await followed.watches()
            await followed.api.say_bytes(garbage)
            followed.api.feeds.clear()
        await followed.watches()
        await followed.api.put(TWO)
        await followed.knows(*URLS)
        assert followed.discovery.status().failures == {"malformed": 4}
