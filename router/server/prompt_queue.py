"""Runs the reading of long prompts in threads: shorter ones first, and each for a limited time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from runtime.inline import within_task

T = TypeVar("T")

LONG = 256 * 1024
"""Bytes of a body above which a job is long: it takes at least 30 to 130 ms to tokenize."""
THREADS = 2
"""Only one of the threads runs long jobs, so a short job never waits for a long one. Tokenizers release the
interpreter's lock, so more threads would take CPU time from the event loop."""
BYTES_PER_SECOND = 256 * 1024
"""A shorter job overtakes a longer one that has waited for less than a second for each of so many bytes of the
difference in length. So no job waits for ever."""
READ_TIMEOUT = 2.0
"""Seconds after which a request no longer waits for its prompt to be read."""


class AbandonedError(Exception):
    """Raised inside a job at its next checkpoint, when its result is no longer waited for."""


class Checkpoint:
    """A running job calls it now and then. Raises `AbandonedError` once `abandoned` is set, from another thread."""

    __slots__ = ("abandoned",)

    def __init__(self) -> None:
        self.abandoned = False

    def __call__(self) -> None:
        if self.abandoned:
            raise AbandonedError


class _Job(Generic[T]):
    __slots__ = ("checkpoint", "order", "result", "size", "work")

    def __init__(self, work: Callable[[Checkpoint], T], size: int, order: float, result: asyncio.Future[T]) -> None:
        self.work = work
        self.size = size
        self.order = order
        self.result = result
        self.checkpoint = Checkpoint()

    def __lt__(self, other: _Job[T]) -> bool:
        return self.order < other.order

    def run(self) -> T:
        self.checkpoint()
        return self.work(self.checkpoint)


class PromptQueue:
    """Jobs, ordered by length and waiting time, that run in `THREADS` threads. For use from one event loop.

    Invariant: at most one long job runs; as long as a thread is free, no job waits that could run on it.
    """

    def __init__(self, timeout: float = READ_TIMEOUT) -> None:
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(THREADS, "prompts")
        self._short: list[_Job[object]] = []
        self._long: list[_Job[object]] = []
        self._running = 0
        self._long_running = False

    async def run(self, size: int, work: Callable[[Checkpoint], T]) -> T:
        """The result of `work`, a job on `size` bytes. Raises what `work` raises, or `TimeoutError` on a timeout."""
        await within_task()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        job = _Job(work, size, loop.time() + size / BYTES_PER_SECOND, result)
        heapq.heappush(self._long if size > LONG else self._short, job)  # type: ignore[misc]
        self._fill()
        try:
            async with asyncio.timeout(self._timeout):
                return await result
        finally:
            job.checkpoint.abandoned = True

    def close(self) -> None:
        """Start no more jobs. Those that are running are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._running < THREADS and (job := self._next()) is not None:
            if job.result.done():  # it is no longer waited for
                continue
            self._running += 1
            if job.size > LONG:
                self._long_running = True
            running = asyncio.wrap_future(self._threads.submit(job.run))
            running.add_done_callback(lambda done, job=job: self._done(job, done))  # type: ignore[misc]

    def _next(self) -> _Job[object] | None:
        queues = [self._short] if self._long_running else [self._short, self._long]
        waiting = [queue for queue in queues if queue]
        return heapq.heappop(min(waiting, key=lambda queue: queue[0])) if waiting else None

    def _done(self, job: _Job[object], done: asyncio.Future[object]) -> None:
        self._running -= 1
        if job.size > LONG:
            self._long_running = False
        self._fill()
        if done.cancelled():
            job.result.cancel()
        elif (error := done.exception()) is not None:
            if not job.result.done():
                job.result.set_exception(error)
        elif not job.result.done():
            job.result.set_result(done.result())
