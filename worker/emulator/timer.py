"""Timers that are more precise than those of the event loop.

uvloop counts whole milliseconds, like libuv and epoll below it. A token of a 15 ms decode step would come up to a
millisecond late, and a fully cached prompt would take 1.5 ms instead of 0.5 ms. Linux's timerfd counts nanoseconds, and
is one more file descriptor for the loop.
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
"""Seconds. Timers of the event loop are rounded up to it, so that they never fire early."""

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_EXPIRATIONS_BYTES = 8
_NANOSECONDS = 1_000_000_000


class Timer(Protocol):
    """A timer for at most one moment."""

    armed: bool
    """Whether a moment is set. Firing does not change it: the callback sets another moment, or cancels."""

    def set(self, delay: float) -> None:
        """Call back in `delay` seconds (0 or more). Replaces the moment set before."""

    def cancel(self) -> None:
        """Do not call back. Idempotent."""

    def close(self) -> None:
        """Release the timer's resources. It must not be used afterwards."""


class LoopTimer:
    """A timer of the event loop."""

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
            self._fd = -1  # a late `set` then fails silently, and touches no other descriptor

    def _arm(self, nanoseconds: int) -> None:
        self.armed = nanoseconds > 0
        value = self._spec.value
        value.seconds, value.nanoseconds = divmod(nanoseconds, _NANOSECONDS)
        self._libc.timerfd_settime(self._fd, 0, ctypes.byref(self._spec), None)

    def _fired(self) -> None:
        try:
            os.read(self._fd, _EXPIRATIONS_BYTES)
        except BlockingIOError:
            return  # set anew or cancelled after the loop saw it expire
        self._callback()


TimerFactory = Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Timer]


def precise_timer() -> TimerFactory:
    """The most precise timer of this platform."""
    return LinuxTimer if sys.platform == "linux" else LoopTimer
