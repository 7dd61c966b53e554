"""Timers that wake an event loop at a moment, not at the next millisecond.

uvloop (as libuv and epoll below it) counts whole milliseconds: at 15 ms a decode step every token would come up to a
millisecond late, and a fully cached prompt of 0.5 ms three times as late as the engine says. Linux's timerfd counts
nanoseconds and is one more file descriptor to the loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import sys
from collections.abc import Callable
from typing import Protocol

LOOP_RESOLUTION = 1e-3
"""Seconds; event loop timers are rounded up to it, so that they never fire before their time."""

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_EXPIRATIONS_BYTES = 8
_NANOSECONDS = 1_000_000_000


class Timer(Protocol):
    """At most one moment to wake up at."""

    armed: bool
    """Whether there is one. It is over when the callback has set no other."""

    def set(self, delay: float) -> None:
        """Call back in `delay` seconds (0 or more), instead of at any moment set before."""

    def cancel(self) -> None:
        """Do not call back. Idempotent."""

    def close(self) -> None:
        """Give up what the timer holds. It is not used afterwards."""


class LoopTimer:
    """The event loop's own timers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self.armed = False

    def set(self, delay: float) -> None:
        self.cancel()
        self.armed = True
        self._handle = self._loop.call_later(math.ceil(delay / LOOP_RESOLUTION) * LOOP_RESOLUTION, self._callback)

    def cancel(self) -> None:
        self.armed = False
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def close(self) -> None:
        self.cancel()


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class LinuxTimer:
    """timerfd_create(2). Python itself has it from 3.13 on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _TimerSpec()
        self.armed = False
        self._loop = loop
        self._callback = callback
        loop.add_reader(self._fd, self._fired)

    def set(self, delay: float) -> None:
        self._arm(max(1, round(delay * _NANOSECONDS)))  # 0 would disarm it

    def cancel(self) -> None:
        self._arm(0)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1  # setting it now is an error that nobody looks at, and touches no other descriptor

    def _arm(self, nanoseconds: int) -> None:
        self.armed = nanoseconds > 0
        value = self._spec.value
        value.seconds, value.nanoseconds = divmod(nanoseconds, _NANOSECONDS)
        self._libc.timerfd_settime(self._fd, 0, ctypes.byref(self._spec), None)

    def _fired(self) -> None:
        try:
            os.read(self._fd, _EXPIRATIONS_BYTES)
        except BlockingIOError:
            return  # set anew or cancelled since the loop saw it
        self._callback()


TimerFactory = Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Timer]


def precise_timer() -> TimerFactory:
    """The finest timer of this platform."""
    return LinuxTimer if sys.platform == "linux" else LoopTimer
