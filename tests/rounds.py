"""Virtual time for code that sleeps and tries again. It counts how often the event loop goes round, so that code that
spins without waiting for anything shows, whatever the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.virtual import VirtualLoop

T = TypeVar("T")

MOST_ROUNDS = 200_000
"""A loop that has gone round so often never waits."""


class CountingLoop(VirtualLoop):
    """Its clock jumps to the next timer when there is nothing else to do."""

    rounds = 0

    def _run_once(self) -> None:
        self.rounds += 1
        if self.rounds > MOST_ROUNDS:
            raise AssertionError(f"the loop went round {MOST_ROUNDS} times: something spins")
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
