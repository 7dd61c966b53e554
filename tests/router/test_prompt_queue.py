"""In which order prompts are read in threads, and when reading ends.

Not covered: what reading yields (test_prompts.py), and how long it takes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from router.server.prompt_queue import BYTES_PER_SECOND, LONG, AbandonedError, Checkpoint, PromptQueue

SHORT = 1000


class Jobs:
    """Jobs that run until the test lets them end, and the order in which they began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def job(self, name: str) -> Callable[[Checkpoint], str]:
        gate = self.gates[name] = threading.Event()

        def work(checkpoint: Checkpoint) -> str:
            self._loop.call_soon_threadsafe(self._begin, name)
            assert gate.wait(20)
            checkpoint()
            return name

        return work

    def _begin(self, name: str) -> None:
        self.began.append(name)
        self._changed.set()

    async def until(self, count: int) -> list[str]:
        while len(self.began) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.began


@pytest.fixture
async def queue() -> AsyncIterator[PromptQueue]:
    queue = PromptQueue(timeout=20)
    yield queue
    queue.close()


async def test_a_short_job_never_waits_for_a_long_one(queue: PromptQueue) -> None:
    jobs = Jobs()
    long = [asyncio.create_task(queue.run(LONG * 10, jobs.job(f"long {n}"))) for n in range(3)]
    await jobs.until(1)
    short = asyncio.create_task(queue.run(SHORT, jobs.job("short")))
    assert await jobs.until(2) == ["long 0", "short"]
    for gate in jobs.gates.values():
        gate.set()
    assert await asyncio.gather(short, *long) == ["short", "long 0", "long 1", "long 2"]


async def test_the_shorter_goes_first(queue: PromptQueue) -> None:
    jobs = Jobs()
    running = [asyncio.create_task(queue.run(SHORT, jobs.job(f"running {n}"))) for n in range(2)]
    await jobs.until(2)
    sizes = {"large": 9, "small": 1, "middle": 5}
    waiting = [asyncio.create_task(queue.run(size * SHORT, jobs.job(name))) for name, size in sizes.items()]
    await asyncio.sleep(0)
    jobs.gates["running 0"].set()
    for count, name in enumerate(("small", "middle", "large"), start=3):
        await jobs.until(count)
        jobs.gates[name].set()
    jobs.gates["running 1"].set()
    await asyncio.gather(*running, *waiting)
    assert jobs.began[2:] == ["small", "middle", "large"]


async def test_whoever_waited_long_enough_goes_before_the_shorter(
    queue: PromptQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, loop, late = Jobs(), asyncio.get_running_loop(), 0.0
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + late)
    running = [asyncio.create_task(queue.run(SHORT, jobs.job(f"running {n}"))) for n in range(2)]
    await jobs.until(2)
    early = asyncio.create_task(queue.run(LONG, jobs.job("early")))
    await asyncio.sleep(0)
    late = 1.5 * LONG / BYTES_PER_SECOND
    newcomer = asyncio.create_task(queue.run(SHORT, jobs.job("newcomer")))
    await asyncio.sleep(0)
    for gate in jobs.gates.values():
        gate.set()
    await asyncio.gather(*running, early, newcomer)
    assert jobs.began[2:] == ["early", "newcomer"]


async def test_nobody_waits_longer_than_is_worth_it() -> None:
    queue, jobs = PromptQueue(timeout=0.01), Jobs()
    with pytest.raises(TimeoutError):
        await queue.run(SHORT, jobs.job("endless"))
    jobs.gates["endless"].set()
    queue.close()


async def test_a_job_that_nobody_waits_for_is_not_begun_and_one_under_way_ends(queue: PromptQueue) -> None:
    jobs = Jobs()
    ended: list[type[BaseException]] = []

    def work(checkpoint: Checkpoint) -> None:
        try:
            jobs.job("running")(checkpoint)
        except AbandonedError:
            ended.append(AbandonedError)
            raise

    running = asyncio.create_task(queue.run(LONG + 1, work))
    await jobs.until(1)
    waiting = asyncio.create_task(queue.run(LONG + 1, jobs.job("waiting")))
    await asyncio.sleep(0)
    for task in (running, waiting):
        task.cancel()
    await asyncio.wait([running, waiting])
    jobs.gates["running"].set()
    last = jobs.job("last")
    jobs.gates["last"].set()
    assert await queue.run(LONG + 1, last) == "last"
    assert (jobs.began, ended) == (["running", "last"], [AbandonedError])


async def test_what_a_job_raises_is_the_callers(queue: PromptQueue) -> None:
    def work(checkpoint: Checkpoint) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await queue.run(SHORT, work)
