"""How every process runs its main coroutine: on uvloop, until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable

import uvloop


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main` on uvloop and return its exit code. Its event is set at the first SIGTERM or SIGINT; the next one
    cancels `main`."""

    async def guarded() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main(stop))

        def on_signal() -> None:
            if stop.is_set():
                task.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            return await task
        except asyncio.CancelledError:
            return 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(guarded())


def freeze_startup_objects() -> None:
    """Call once, when a process has made all that it keeps: the garbage collector does not walk those objects again.

    A full collection of what a process imports takes some ten milliseconds, in which no request moves.
    """
    gc.collect()
    gc.freeze()
