"""Event loops on virtual time, and a transport without a socket, for tests that control every step of the loop."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Never waits for a timer: it adds that time to its clock. Without a timer only a thread can wake the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            self.now += timeout
        return super().select(0 if timeout is not None else None)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only in `advance` and `run`. Code that runs on it may not wait for a real socket or a thread."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def settle(self) -> None:
        """Run everything that is ready now, and what that makes ready."""
        self.run_until_complete(_turns(8))

    def call(self, callback: Callable[[], T]) -> T:
        """What a callback of the loop returns."""
        results: list[T] = []
        self.call_soon(lambda: results.append(callback()))
        self.run_until_complete(asyncio.sleep(0))
        return results[0]

    def advance(self, seconds: float) -> None:
        """Let time pass; timers due in it run, each at its time."""
        self.run_until_complete(asyncio.sleep(seconds))
        self.settle()


MAX_ITERATIONS = 200_000
"""An event loop with more iterations than this never waits."""


class CountingLoop(VirtualLoop):
    """Counts its iterations, so that code that spins without waiting for anything is found on any machine."""

    iterations = 0

    def _run_once(self) -> None:
        self.iterations += 1
        if self.iterations > MAX_ITERATIONS:
            raise AssertionError(f"the event loop has run {MAX_ITERATIONS} times: something spins")
        super()._run_once()  # type: ignore[misc]  # asyncio's own step

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for threads without a limit: Python 3.13 makes the limit a timer, which this clock would jump to."""
        await super().shutdown_default_executor()


def run(main: Callable[[CountingLoop], Awaitable[T]]) -> T:
    """Run `main(loop)` on virtual time."""

    async def wrapped(loop: CountingLoop) -> Any:
        return await main(loop)

    loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result: T = runner.run(wrapped(loop))
        return result


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class FakeTransport(asyncio.Transport):
    """A stream transport without a socket.

    As asyncio's and uvloop's: `connection_lost` comes once, after the last data, in a later turn of the loop; nothing
    is received while reading is paused; what is written after `close` or `abort` is dropped. Not modelled: high and low
    water marks (a test calls `pause_writing` itself), TLS, `get_extra_info` beyond what is given here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, extra: Mapping[str, Any]) -> None:
        super().__init__(extra)
        self._loop = loop
        self.protocol = protocol
        self.written = b""
        self.unsent = 0
        """Bytes that the other end has not taken."""
        self.paused = False
        self.closing = False
        self.ended = False
        """No more is written: the other end reads an end of file."""
        self.lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.closing:
            assert not self.ended, "written behind the end of file"
            self.written += bytes(data)

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        assert not self.paused, "paused twice"
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused, "resumed without a pause"
        self.paused = False

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        """Close once all is sent; what is unsent keeps the connection open."""
        if not self.closing:
            self.closing = True
            if not self.unsent:
                self._loop.call_soon(self.lose, None)

    def abort(self) -> None:
        self.closing = True
        self.unsent = 0
        self._loop.call_soon(self.lose, None)

    def lose(self, error: Exception | None) -> None:
        """The connection is gone."""
        self.closing = True
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)

    def receive(self, data: bytes) -> bool:
        """Data from the other end; False when it is not read now."""
        if self.paused or self.closing:
            return False
        self.protocol.data_received(data)
        return True
