"""Proof that watches are alive.

Covers: when connections are cut, from which version a watch goes on, how soon the next one begins, what is told of the
events; in virtual time, with streams in memory. Not covered: reading a watch off a connection (tests/runtime/kube),
breaking connections (test_connections.py).
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from controller.kube.kinds import Kind
from controller.kube.liveness import PERIOD, SLACK, WatchLiveness
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch

pytestmark = pytest.mark.looptime


class Stream:
    """One watch: `events`, then its end after `seconds`. `None` for the events: it never brings anything."""

    def __init__(self, events: list[dict[str, Any]] | None, seconds: float, slack: float) -> None:
        self._events = events
        self._seconds = seconds
        self._slack = slack

    async def next(self) -> object | None:
        if self._events is None:
            await asyncio.sleep(self._seconds + self._slack)
            raise KubeApiError.of(ApiFailureCause.SILENT, "nothing came")
        if self._events:
            return self._events.pop(0)
        await asyncio.sleep(self._seconds)
        return None

    def close(self) -> None:
        self._events = None


class Server:
    """What each watch brings, in turn; then watches without events. `lasting`: whether they last as long as is asked
    for."""

    def __init__(self, *watches: list[dict[str, Any]] | KubeApiError | None, lasting: bool = True) -> None:
        self.asked: list[tuple[str, int]] = []
        self._lasting = lasting
        self._watches = list(watches)

    async def watch(self, kind: Kind, namespace: str | None, watch: Watch, slack: float) -> Stream:
        self.asked.append((watch.version, watch.seconds))
        events = self._watches.pop(0) if self._watches else []
        if isinstance(events, KubeApiError):
            raise events
        return Stream(events, watch.seconds if self._lasting else 0, slack)


class Cutter:
    """How often, and when, all connections were cut."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def cut(self) -> None:
        self.at.append(asyncio.get_running_loop().time())


def told(kind: str, version: int) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"name": f"c{version}", "resourceVersion": str(version)}}}


async def watched(server: Server, seconds: float) -> tuple[list[float], list[tuple[str, str]]]:
    """The cuts, and what was told, within this time."""
    connections, seen = Cutter(), []
    liveness = WatchLiveness(
        server,  # type: ignore[arg-type]
        connections,  # type: ignore[arg-type]
        lambda change, item: seen.append((change, item["metadata"]["name"])),
        namespace=None,
        rng=random.Random(1),
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await liveness.run()
    return connections.at, seen


async def test_what_it_hears_is_told_and_it_goes_on_from_there():
    server = Server([told("ADDED", 4), told("BOOKMARK", 9)], [told("DELETED", 11)])
    assert await watched(server, 2.5 * PERIOD) == ([], [("ADDED", "c4"), ("DELETED", "c11")])
    assert server.asked == [("0", PERIOD), ("9", PERIOD), ("11", PERIOD)]


async def test_a_watch_whose_end_does_not_come_breaks_all_connections():
    cuts, _ = await watched(Server([], None), 3.5 * PERIOD)
    assert cuts == [pytest.approx(2 * PERIOD + SLACK)]
    assert max(cuts) - PERIOD < 20, "the bound that is promised, from the moment in which it went dead"


async def test_a_position_that_is_no_longer_kept_means_to_begin_anew():
    server = Server([told("BOOKMARK", 9)], KubeApiError(410, "Expired", "too old"))
    assert (await watched(server, 2 * PERIOD))[0] == []
    assert [version for version, _ in server.asked] == ["0", "9", "0"]


async def test_a_server_that_refuses_is_not_asked_in_a_hurry():
    server = Server(*[KubeApiError(0, "Unreachable", "no")] * 20)
    assert (await watched(server, 10))[0] == [], "there is nothing to break where nothing is connected"
    assert len(server.asked) <= 10


async def test_watches_that_end_at_once_are_not_begun_in_a_hurry():
    server = Server(lasting=False)
    assert (await watched(server, 10.5))[0] == []
    assert len(server.asked) == 6, "one every 2 s"
