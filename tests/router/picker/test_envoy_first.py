"""Workers behind an Envoy: it is told of new ones before the router, by a file, and for so long the router waits.

Not covered: that Envoy follows the file (tests/envoy/test_data_plane.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.sources import DiscoveryStatus
from router.picker.envoy_first import CONFIRMATION, EnvoyFirst

pytestmark = pytest.mark.looptime

ONE, TWO = "http://10.0.0.1:8100", "http://10.0.0.2:8100"


class Lists:
    """A discovery that yields what it is given."""

    def __init__(self) -> None:
        self.given: asyncio.Queue[DiscoveredWorkers] = asyncio.Queue()

    def status(self) -> DiscoveryStatus:
        return DiscoveryStatus("static", known=True, healthy=True, age=None)

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        while True:
            yield await self.given.get()

    def give(self, *urls: str) -> None:
        self.given.put_nowait({url: DiscoveredWorker() for url in urls})


class Admin:
    """What `runtime.envoy_admin.EnvoyAdmin.knows` says, `takes` seconds after the first question about new workers."""

    def __init__(self, takes: float) -> None:
        self.takes = takes
        self.asked: dict[frozenset[str], float] = {}

    async def knows(self, workers: Iterable[str]) -> bool:
        now = asyncio.get_running_loop().time()
        return now - self.asked.setdefault(frozenset(workers), now) >= self.takes


async def plain() -> bool:
    """A port without TLS needs no certificate."""
    return True


def in_file(path: Path) -> set[str]:
    found: Mapping[str, Any] = json.loads(path.read_text())
    [assignment] = found["resources"]
    hosts = [each["endpoint"]["address"]["socket_address"] for each in assignment["endpoints"][0]["lb_endpoints"]]
    return {f"http://{each['address']}:{each['port_value']}" for each in hosts}


@pytest.mark.parametrize(
    ("takes", "waited"),
    [pytest.param(0.3, 0.3, id="it reads"), pytest.param(60.0, CONFIRMATION, id="it reads too late")],
)
async def test_a_new_worker_is_kept_back_until_envoy_knows_it(tmp_path: Path, takes: float, waited: float) -> None:
    source, path, clock = Lists(), tmp_path / "endpoints.json", asyncio.get_running_loop().time
    seen = EnvoyFirst(source, path, Admin(takes).knows, tuple, plain).watch()
    source.give(ONE)
    begun = clock()
    assert set(await anext(seen)) == {ONE}
    assert clock() - begun == pytest.approx(waited, abs=0.03)
    assert in_file(path) == {ONE}
    source.give(ONE, TWO)
    assert set(await anext(seen)) == {ONE, TWO}
    assert in_file(path) == {ONE, TWO}
    begun = clock()
    source.give(TWO)
    assert set(await anext(seen)) == {TWO}
    assert clock() == begun, "nothing is waited for when one leaves"
    assert in_file(path) == {TWO}


async def test_workers_that_register_by_themselves_are_told_as_well(tmp_path: Path) -> None:
    source, path = Lists(), tmp_path / "endpoints.json"
    first = EnvoyFirst(source, path, Admin(0.0).knows, lambda: [TWO], plain)
    source.give(ONE)
    await anext(first.watch())
    assert in_file(path) == {ONE, TWO}


async def test_without_its_certificate_envoy_gets_no_workers_and_the_router_none(tmp_path: Path) -> None:
    source, path, clock = Lists(), tmp_path / "endpoints.json", asyncio.get_running_loop().time
    first = EnvoyFirst(source, path, Admin(0.0).knows, tuple, lambda: _after(10.0))

    async def _after(seconds: float) -> bool:
        return clock() >= begun + seconds

    begun = clock()
    source.give(ONE)
    assert set(await anext(first.watch())) == {ONE}
    assert clock() - begun == pytest.approx(10.0, abs=0.03)
