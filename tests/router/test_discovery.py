"""Lists of workers, and what the router does when they change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router.core.membership import Listing
from router.server.discovery import FileDiscovery, StaticDiscovery, WorkerUrlError, worker_url
from tests.router.conftest import StartRouter, until
from tests.router.fakes import fake_workers, good


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.1:8100", "http://10.0.0.1:8100"),
        (" http://Host.Example:8100/ ", "http://host.example:8100"),
        ("https://host", "https://host"),
        ("http://[::1]:8100", "http://[::1]:8100"),
    ],
)
def test_urls_have_one_form(text: str, url: str) -> None:
    assert worker_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "host:8100", "ftp://h:1", "http://h:1/v1", "http://", "http://h:x", "http://h?q=1"]
)
def test_what_is_no_workers_url(text: str) -> None:
    with pytest.raises(WorkerUrlError, match="URL"):
        worker_url(text)


async def test_a_static_list_is_told_once() -> None:
    assert [members async for members in StaticDiscovery(["http://a:1", "http://a:1/"]).watch()] == [
        {"http://a:1": Listing()}
    ]


async def test_a_file_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_text("# workers\nhttp://a:1\n\nhttp://b:2  # the second\n")
    seen = FileDiscovery(path, interval=0.01).watch()
    assert await anext(seen) == {"http://a:1": Listing(), "http://b:2": Listing()}
    path.write_text("http://b:2\n")
    assert await anext(seen) == {"http://b:2": Listing()}


@pytest.mark.parametrize("bad", [b"http://a:1\nnot a url\n", b"\xff\xff", None], ids=["line", "encoding", "missing"])
async def test_an_unusable_file_leaves_the_last_list_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes | None
) -> None:
    path = tmp_path / "workers"
    path.write_text("http://a:1\n")
    seen = FileDiscovery(path, interval=0.01).watch()
    await anext(seen)
    changed = asyncio.ensure_future(anext(seen))
    if bad is None:
        path.unlink()
    else:
        path.write_bytes(bad)
    await until(lambda: "workers_file_unusable" in caplog.text)
    assert not changed.done()
    (tmp_path / "new").write_text("http://b:2\n")
    (tmp_path / "new").replace(path)
    assert await changed == {"http://b:2": Listing()}


async def test_workers_come_and_go(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one]) as router:
        router.router.members.apply({one.url: Listing(), two.url: Listing()})
        await router.ready(2)
        router.router.members.apply({two.url: Listing()})
        assert router.candidates() == 1
        for _ in range(3):
            assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        assert one.received == []


async def test_a_terminating_worker_gets_nothing_new(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one, two]) as router:
        router.router.members.apply({one.url: Listing(serving=False), two.url: Listing()})
        for _ in range(3):
            assert (await router.complete()).headers["x-kvcluster-worker"] == two.url
        (status,) = [s for s in router.router.fleet.workers(router.router.clock()) if s.url == one.url]
        assert not status.ready
        router.router.members.apply({one.url: Listing(), two.url: Listing()})
        assert router.candidates() == 2


async def test_unanswered_requests_of_a_removed_worker_go_elsewhere(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as (one, two), start_router([one, two]) as router:
        one.frozen.set()
        running = asyncio.create_task(router.complete())
        await until(lambda: len(router.router.attempts) == 1)
        router.router.members.apply({two.url: Listing()})
        assert (await running).headers["x-kvcluster-worker"] == two.url
