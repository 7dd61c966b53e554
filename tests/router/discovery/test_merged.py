"""Several sources of workers as one.

Not covered: each source by itself (test_sources.py, test_kubernetes.py), and the Services that a manifest names
(tests/controller/objects/test_serves.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.merged import MergedDiscovery
from router.discovery.sources import DiscoveryStatus


class Scripted:
    """A source that names what a test puts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current = DiscoveryStatus("kubernetes", known=False, healthy=False, age=None)
        self._lists: asyncio.Queue[DiscoveredWorkers] = asyncio.Queue()

    def status(self) -> DiscoveryStatus:
        return self.current

    def put(self, *urls: str, intake: Intake = Intake.OPEN) -> None:
        self.current = DiscoveryStatus("kubernetes", True, True, 1.0, failures={"cut": 1})
        self._lists.put_nowait({url: DiscoveredWorker(intake, pod=self.name) for url in urls})

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        while True:
            yield await self._lists.get()


async def test_the_union_follows_every_source_and_the_first_one_wins() -> None:
    own, other = Scripted("own"), Scripted("other")
    watch = MergedDiscovery([own, other]).watch()
    own.put("http://a:1", "http://b:1")
    assert set(await anext(watch)) == {"http://a:1", "http://b:1"}
    other.put("http://b:1", "http://c:1")
    merged = await anext(watch)
    assert {url: worker.pod for url, worker in merged.items()} == {
        "http://a:1": "own", "http://b:1": "own", "http://c:1": "other"
    }  # fmt: skip
    own.put()
    assert set(await anext(watch)) == {"http://b:1", "http://c:1"}
    await watch.aclose()


async def test_nothing_is_yielded_before_the_first_source_is_known() -> None:
    own, other = Scripted("own"), Scripted("other")
    watch = MergedDiscovery([own, other]).watch()
    other.put("http://c:1")
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    own.put("http://a:1")
    assert set(await waiting) == {"http://a:1", "http://c:1"}
    await watch.aclose()


def test_the_status_is_that_of_all() -> None:
    own, other = Scripted("own"), Scripted("other")
    merged = MergedDiscovery([own, other])
    assert (merged.status().known, merged.status().age) == (False, None)
    own.put()
    other.current = DiscoveryStatus(
        "kubernetes", True, False, 7.0, "no rights", {"cut": 2, "forbidden": 1}, {"expired": 1}
    )
    assert merged.status() == DiscoveryStatus(
        "kubernetes", True, False, 7.0, "no rights", {"cut": 3, "forbidden": 1}, {"expired": 1}
    )
