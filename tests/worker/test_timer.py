"""Timers: the most precise one of the platform behaves like the event loop's.

Not covered: how precise it is, which a busy machine decides.
"""

from __future__ import annotations

import asyncio

import pytest

from worker.emulator.timer import LoopTimer, TimerFactory, precise_timer

KINDS = pytest.mark.parametrize(
    "kind", [pytest.param(LoopTimer, id="loop"), pytest.param(precise_timer(), id="precise")]
)


@KINDS
async def test_it_calls_back_once_and_never_early(kind: TimerFactory) -> None:
    loop = asyncio.get_running_loop()
    fired: asyncio.Queue[float] = asyncio.Queue()
    timer = kind(loop, lambda: fired.put_nowait(loop.time()))
    for delay in (0.0, 0.0004, 0.003):
        begun = loop.time()
        timer.set(delay)
        assert timer.armed
        # The event loop rounds its own clock to its resolution.
        assert await fired.get() >= begun + delay - 1e-6
    timer.close()


@KINDS
async def test_the_last_delay_set_counts(kind: TimerFactory) -> None:
    loop = asyncio.get_running_loop()
    fired: asyncio.Queue[float] = asyncio.Queue()
    timer = kind(loop, lambda: fired.put_nowait(loop.time()))
    timer.set(3600.0)
    timer.set(0.001)
    await fired.get()
    timer.set(0.0)
    timer.cancel()
    timer.cancel()
    assert not timer.armed
    other = kind(loop, lambda: fired.put_nowait(-1.0))
    other.set(0.005)
    assert await fired.get() == -1.0, "a cancelled timer does not call back"
    timer.close()
    other.close()
