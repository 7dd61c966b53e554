"""How a process runs its main coroutine.

Covers: signals and exit codes. Not covered: what processes do when they are told to stop
(tests/router/test_process.py, tests/worker/test_process.py).
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from runtime.process import run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_sets_the_event_at_a_signal(number: signal.Signals) -> None:
    async def main(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), number)
        await stop.wait()
        return 7

    assert run(main) == 7


def test_a_second_signal_ends_a_main_that_lingers() -> None:
    async def main(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        return 0

    assert run(main) == 1
