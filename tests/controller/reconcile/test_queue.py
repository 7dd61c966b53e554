"""The work queue in virtual time: each key is handled when it is due, never twice at once, and again after a failure.

Not covered: what the handler does (test_reconciler).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from controller.reconcile.inventory import Key
from controller.reconcile.queue import BACKOFF, RetryLater, WorkQueue

A, B, C = ("ns", "a"), ("ns", "b"), ("ns", "c")

pytestmark = pytest.mark.looptime


@asynccontextmanager
async def running(handler: Callable[[Key], Awaitable[float | None]], workers: int = 2):
    queue = WorkQueue(handler, workers=workers, rng=random.Random(1))
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Log:
    """A handler that writes down when it was called, and takes `seconds`."""

    def __init__(self, seconds: float = 0.0, again: float | None = None) -> None:
        self.calls: list[tuple[float, Key]] = []
        self.at_once: dict[Key, int] = {}
        self._seconds, self._again = seconds, again

    async def __call__(self, key: Key) -> float | None:
        self.calls.append((asyncio.get_running_loop().time(), key))
        self.at_once[key] = self.at_once.get(key, 0) + 1
        assert self.at_once[key] == 1, "a key is handled by one worker at a time"
        await asyncio.sleep(self._seconds)
        self.at_once[key] -= 1
        return self._again


async def test_a_key_that_is_added_often_is_handled_once():
    log = Log()
    async with running(log) as queue:
        for delay in (1.0, 0.5, 2.0):
            queue.add(A, delay)
        await asyncio.sleep(10)
    assert log.calls == [(0.5, A)]


async def test_a_key_that_is_added_while_it_is_handled_is_handled_again():
    log = Log(seconds=1.0)
    async with running(log) as queue:
        queue.add(A)
        await asyncio.sleep(0.5)
        queue.add(A)
        await asyncio.sleep(10)
    assert log.calls == [(0.0, A), (1.0, A)]


async def test_no_more_than_so_many_at_once_and_the_earliest_first():
    log = Log(seconds=1.0)
    async with running(log, workers=1) as queue:
        queue.add(C, 0.3)
        queue.add(B, 0.2)
        queue.add(A, 0.1)
        await asyncio.sleep(10)
    assert log.calls == [(0.1, A), (1.1, B), (2.1, C)]


async def test_it_comes_back_when_the_handler_asks_for_it():
    log = Log(again=10.0)
    async with running(log) as queue:
        queue.add(A)
        await asyncio.sleep(25)
    assert [moment for moment, _ in log.calls] == [0.0, 10.0, 20.0]


async def test_failures_are_tried_again_ever_later_and_do_not_hold_up_others():
    moments: list[float] = []
    others = Log()

    async def handler(key: Key) -> float | None:
        if key != A:
            return await others(key)
        moments.append(asyncio.get_running_loop().time())
        if len(moments) == 3:
            raise RuntimeError("unexpected")
        raise RetryLater("not now")

    async with running(handler) as queue:
        queue.add(A)
        queue.add(B)
        await asyncio.sleep(600)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert gaps[0] <= 0.6 <= gaps[3]
    assert max(gaps) <= BACKOFF.longest
    assert len(moments) < 25, "no hot loop"
    assert others.calls == [(0.0, B)]


async def test_a_handler_that_makes_progress_starts_its_back_off_anew():
    moments: list[float] = []

    async def handler(key: Key) -> float | None:
        moments.append(asyncio.get_running_loop().time())
        raise RetryLater("one more was done", progress=True)

    async with running(handler) as queue:
        queue.add(A)
        await asyncio.sleep(10)
    assert max(later - earlier for earlier, later in itertools.pairwise(moments)) <= 0.5


async def test_a_delay_that_the_server_names_is_kept():
    moments: list[float] = []

    async def handler(key: Key) -> float | None:
        moments.append(asyncio.get_running_loop().time())
        if len(moments) == 1:
            raise RetryLater("slow down", after=30.0)
        return None

    async with running(handler) as queue:
        queue.add(A)
        await asyncio.sleep(100)
    assert moments == [0.0, 30.0]
