"""How every process runs its main coroutine: on uvloop, until SIGTERM; and with which exit code it ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from runtime.logs import EventLogger

logger = EventLogger(__name__)

EXIT_FAILED = 1
EXIT_USAGE = 2


def exit_code(program: str, main: Callable[[], int], *invalid: type[Exception]) -> int:
    """The exit code that `main` returns. An `invalid` error that it raises is about the settings (`EXIT_USAGE`), an
    `OSError` about a port that it cannot listen on (`EXIT_FAILED`); it is printed."""
    try:
        return main()
    except invalid as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    except OSError as error:
        print(f"{program}: cannot listen: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_FAILED


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


def report_crash(task: asyncio.Task[Any]) -> None:
    """To be called when a task has ended that runs as long as its process: says in the log that a defect ended it."""
    if not task.cancelled():
        try:
            task.result()
        except Exception:
            logger.exception("task_crashed", task=getattr(task.get_coro(), "__qualname__", task.get_name()))


def freeze_startup_objects() -> None:
    """Call once, when a process has made all that it keeps: the garbage collector does not walk those objects again.

    A full collection of what a process imports takes some ten milliseconds, in which no request moves.
    """
    gc.collect()
    gc.freeze()
