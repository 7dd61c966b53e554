"""How a process runs its main coroutine.

Covers: signals, exit codes, and tasks that a defect ends. Not covered: what processes do when they are told to stop
(tests/router/test_process.py, tests/worker/test_process.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import pytest

from runtime.process import report_crash, run


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


async def test_a_task_that_a_defect_ends_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def follow() -> None:
        raise KeyError("a defect")

    task = asyncio.create_task(follow())
    task.add_done_callback(report_crash)
    stopped = asyncio.create_task(asyncio.Event().wait())
    stopped.add_done_callback(report_crash)
    stopped.cancel()
    with caplog.at_level(logging.ERROR):
        await asyncio.wait([task, stopped])
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.message == "task_crashed"
    assert record.exc_info is not None
