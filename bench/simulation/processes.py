"""Simulations in several processes at once. The results do not depend on how many there are."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from types import TracebackType
from typing import Any, Self, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Processes:
    """A pool of processes that starts when it is first needed. Leaving the context ends them, after an exception (an
    interrupt, say) at once."""

    def __init__(self, jobs: int | None = None) -> None:
        """`jobs`: how many, None: one for each core. With one, everything is done in this process."""
        self.jobs = jobs or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if kind is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
        pool.shutdown()

    def map(
        self, make: Callable[[_Item], _Made], items: Sequence[_Item], done: Callable[[int], None] = lambda made: None
    ) -> list[_Made]:
        """What `make`, a function of a module, makes of each item, in their order. `done(n)` is called when n items are
        done. Raises what `make` raises."""
        if self.jobs == 1 or len(items) <= 1:
            made = []
            for item in items:
                made.append(make(item))
                done(len(made))
            return made
        if self._pool is None:
            # Spawned, because a forked process would inherit the locks of a progress bar's thread.
            self._pool = ProcessPoolExecutor(self.jobs, get_context("spawn"), _die_at_once)
        with _interrupt_held():
            futures: list[Future[Any]] = [self._pool.submit(make, item) for item in items]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            done(len(items) - len(waiting))
        return [future.result() for future in futures]


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """An interrupt within the context is raised at its end: a process that is just being started would otherwise not
    get all that it reads at its start, and print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield  # interrupts are raised in the main thread
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def _die_at_once() -> None:
    """Ctrl-C reaches every process of the terminal: those that simulate end without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
