"""Coroutines that run in their callers: when they start, what wakes them, how they are cancelled, and how they become
tasks.

Not covered: requests that run so (tests/runtime/http, tests/router).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from runtime.inline import InlineTask, Signal, within_task
from tests.virtual import VirtualLoop


class Bed:
    """Inline tasks on virtual time, and what happened to them."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.signal = Signal(self.loop)
        self.seen: list[str] = []
        self.ended: list[InlineTask] = []
        self.failed: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.failed.append(context))

    def start(self, work: Callable[[], Coroutine[Any, None, None]]) -> InlineTask:
        task = InlineTask(self.loop, work(), self.ended.append)
        task.step()
        return task

    async def waits(self) -> None:
        """Waits for the signal, and notes how that ended."""
        self.seen.append("begun")
        try:
            await self.signal
        except asyncio.CancelledError as error:
            self.seen.append(f"cancelled: {error}")
            raise
        self.seen.append("woken")


@pytest.fixture
def bed() -> Any:
    made = Bed()
    yield made
    made.loop.settle()
    made.loop.close()


def test_it_runs_where_it_is_called(bed: Bed) -> None:
    task = bed.start(bed.waits)
    assert bed.seen == ["begun"]
    bed.signal.set()
    assert (bed.seen, bed.ended) == (["begun", "woken"], [task])


def test_a_signal_that_nobody_waits_for_is_lost(bed: Bed) -> None:
    bed.signal.set()
    bed.start(bed.waits)
    bed.loop.settle()
    assert bed.seen == ["begun"]
    bed.signal.set_soon()
    assert bed.seen == ["begun"]
    bed.loop.settle()
    assert bed.seen == ["begun", "woken"]


def test_it_is_cancelled_in_the_next_turn_once(bed: Bed) -> None:
    task = bed.start(bed.waits)
    assert task.cancel("why")
    assert bed.seen == ["begun"]
    bed.loop.settle()
    assert (bed.seen, bed.ended) == (["begun", "cancelled: why"], [task])
    assert not task.cancel()
    bed.signal.set()
    assert (bed.ended, bed.failed) == ([task], [])


def test_one_that_is_woken_before_its_cancellation_is_cancelled(bed: Bed) -> None:
    task = bed.start(bed.waits)
    task.cancel("why")
    bed.signal.set()
    bed.loop.settle()
    assert (bed.seen, bed.ended) == (["begun", "cancelled: why"], [task])


def test_one_that_cancels_itself_is_cancelled_where_it_waits_next(bed: Bed) -> None:
    tasks: list[InlineTask] = []

    async def work() -> None:
        tasks[0].cancel("self")
        await bed.waits()

    tasks.append(InlineTask(bed.loop, work(), bed.ended.append))
    tasks[0].step()
    bed.loop.settle()
    assert bed.seen == ["begun", "cancelled: self"]


def test_requests_to_cancel_are_counted(bed: Bed) -> None:
    async def stubborn() -> None:
        for _ in range(2):
            try:
                await bed.signal
            except asyncio.CancelledError:
                bed.seen.append("cancelled")

    task = bed.start(stubborn)
    task.cancel()
    bed.loop.settle()
    task.cancel()
    assert (task.uncancel(), task.uncancel(), task.uncancel()) == (1, 0, 0)
    bed.loop.settle()
    assert (bed.seen, bed.ended) == (["cancelled", "cancelled"], [task])


@pytest.mark.parametrize("cancel", [pytest.param(True, id="cancelled"), pytest.param(False, id="done")])
def test_it_waits_for_futures_too(bed: Bed, cancel: bool) -> None:
    future: asyncio.Future[str] = bed.loop.create_future()

    async def work() -> None:
        await asyncio.sleep(0)
        try:
            bed.seen.append(await future)
        except asyncio.CancelledError as error:
            bed.seen.append(f"cancelled: {error}")

    task = bed.start(work)
    bed.loop.settle()
    if cancel:
        task.cancel("why")
    else:
        future.set_result("done")
    bed.loop.settle()
    assert (bed.seen, bed.ended) == (["cancelled: why" if cancel else "done"], [task])


def test_what_it_raises_is_reported(bed: Bed) -> None:
    async def work() -> None:
        raise ValueError("a bug")

    task = bed.start(work)
    assert (bed.ended, len(bed.failed)) == ([task], 1)


@pytest.mark.parametrize("cancel", [pytest.param(True, id="cancelled"), pytest.param(False, id="not")])
def test_it_becomes_a_task_where_that_is_needed(bed: Bed, cancel: bool) -> None:
    async def work() -> None:
        assert asyncio.current_task() is None
        await within_task()
        assert asyncio.current_task() is not None
        await within_task()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        bed.seen.append(f"at {bed.loop.time():g}")
        await bed.waits()

    task = InlineTask(bed.loop, work(), bed.ended.append)
    bed.loop.call_soon(task.step)
    bed.loop.advance(6)
    if cancel:
        task.cancel("why")
    else:
        bed.signal.set()
    bed.loop.settle()
    assert (bed.seen, bed.ended) == (["at 5", "begun", "cancelled: why" if cancel else "woken"], [task])
    assert not task.cancel()


def test_a_request_to_cancel_outlives_the_change_into_a_task(bed: Bed) -> None:
    tasks: list[InlineTask] = []

    async def work() -> None:
        tasks[0].cancel("why")
        await within_task()
        bed.seen.append("never")

    tasks.append(InlineTask(bed.loop, work(), bed.ended.append))
    bed.loop.call_soon(tasks[0].step)
    bed.loop.settle()
    assert (bed.seen, bed.ended) == ([], tasks)


class Panic(BaseException):
    """What a library in Rust raises when it panics."""


def test_whatever_it_raises_it_is_over(bed: Bed) -> None:
    async def panics() -> None:
        await bed.signal
        raise Panic

    task = bed.start(panics)
    bed.signal.set()
    assert bed.ended == [task]
    assert [type(each["exception"]) for each in bed.failed] == [Panic]
    assert not task.cancel()


def test_a_cancellation_is_delivered_once_though_what_it_waits_for_happens_in_the_same_turn(bed: Bed) -> None:
    first, second = bed.loop.create_future(), bed.loop.create_future()

    async def goes_on() -> None:
        for each in (bed.signal, first, second):
            try:
                await each
                bed.seen.append("happened")
            except asyncio.CancelledError as error:
                bed.seen.append(f"cancelled: {error}")

    task = bed.start(goes_on)
    task.cancel("one")
    bed.signal.set()
    first.set_result(None)
    task.cancel("two")
    bed.loop.settle()
    assert bed.seen == ["cancelled: one", "cancelled: two"]
    second.set_result(None)
    bed.loop.settle()
    assert (bed.seen[2:], bed.ended, bed.failed) == (["happened"], [task], [])
