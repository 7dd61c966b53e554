"""Coroutines that run where they are called and where what they wait for happens, not in turns of the event loop.

A task of asyncio's starts in the loop's next turn, and goes on a turn after what it waited for has happened. Each turn
asks the kernel for news, and so a proxy that has one thing to do (pass a piece on) takes twice the turns. An
`InlineTask` runs at once as far as it gets, and on from a `Signal` within the call that sets it.

It is no task: `asyncio.current_task` does not know it, and so `asyncio.timeout` refuses it. A coroutine that needs
these calls `within_task` first, which makes it one of asyncio's tasks from there on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, Protocol


class Cancellable(Protocol):
    """What runs a coroutine: an `InlineTask`, or a task of asyncio's. As `asyncio.Task` describes them."""

    def cancel(self, msg: Any | None = None) -> bool: ...

    def uncancel(self) -> int: ...


class Signal:
    """Wakes the one coroutine that awaits it. It may be awaited again and again, also by a task of asyncio's.

    Whoever awaits it looks afterwards whether what it waits for has happened: it may be woken without that.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancelled", "_context", "_inline", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._inline: InlineTask | None = None
        self._callback: Callable[[Signal], object] | None = None
        self._context: Context | None = None
        self._cancelled: asyncio.CancelledError | None = None

    def __await__(self) -> Generator[Signal, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def set(self) -> None:
        """Wake. An `InlineTask` has run on when this returns, so call it last, and only from a callback of the loop."""
        inline = self._inline
        if inline is not None:
            self._inline = None
            inline.step()
        elif self._callback is not None:
            callback, self._callback = self._callback, None
            self._loop.call_soon(callback, self, context=self._context)

    def set_soon(self) -> None:
        """Wake in the loop's next turn: for callers that a task may call."""
        self._loop.call_soon(self.set)

    # --- what a task of asyncio's asks of a future ---

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Signal], object], *, context: Context | None = None) -> None:
        self._callback, self._context = callback, context

    def cancel(self, msg: Any | None = None) -> bool:
        if self._callback is None:
            return False
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.set()
        return True

    def result(self) -> None:
        if self._cancelled is not None:
            cancelled, self._cancelled = self._cancelled, None
            raise cancelled


class _Promotion:
    """Awaited, it asks the `InlineTask` to go on as a task of asyncio's."""

    __slots__ = ()

    def __await__(self) -> Generator[_Promotion, None, None]:
        yield self


_PROMOTION = _Promotion()


async def within_task() -> None:
    """From here on the caller runs in a task of asyncio's."""
    if asyncio.current_task() is None:
        await _PROMOTION


class InlineTask:
    """Runs a coroutine to its end, like a task of asyncio's; `start` it from a callback of the loop.

    `on_end` is called once, with this, when the coroutine has returned. What it raises goes to the loop's exception
    handler, except for `CancelledError`.
    """

    __slots__ = (
        "_cancel_message",
        "_coroutine",
        "_loop",
        "_must_cancel",
        "_on_end",
        "_requests",
        "_task",
        "_waits_for",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, None, None],
        on_end: Callable[[InlineTask], object],
    ) -> None:
        self._loop = loop
        self._coroutine: Coroutine[Any, None, None] | None = coroutine
        self._on_end = on_end
        self._waits_for: Any = None
        """A `Signal` or a future; None: it runs, or is over."""
        self._must_cancel = False
        self._cancel_message: Any = None
        self._requests = 0
        """Of cancellation."""
        self._task: asyncio.Task[None] | None = None
        """What it has become (`within_task`)."""

    def step(self, error: BaseException | None = None) -> None:
        """Start, or go on, until it has to wait."""
        coroutine = self._coroutine
        if coroutine is None:
            return
        self._waits_for = None
        if self._must_cancel:
            self._must_cancel = False
            message, self._cancel_message = self._cancel_message, None
            error = asyncio.CancelledError() if message is None else asyncio.CancelledError(message)
        try:
            waits_for = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration:
            self._end()
        except asyncio.CancelledError:
            self._end()
        except (KeyboardInterrupt, SystemExit):
            self._end()
            raise
        except BaseException as raised:  # noqa: BLE001  # nobody awaits it; a Rust library's panic is no Exception
            self._loop.call_exception_handler({"message": "an inline task failed", "exception": raised})
            self._end()
        else:
            self._wait(waits_for)

    def _wait(self, waits_for: Any) -> None:
        if type(waits_for) is Signal:
            waits_for._asyncio_future_blocking = False
            waits_for._inline = self
            self._waits_for = waits_for
            if self._must_cancel:
                self._loop.call_soon(self._cancelled)
        elif waits_for is _PROMOTION:
            coroutine, self._coroutine = self._coroutine, None
            if coroutine is not None:
                self._task = self._loop.create_task(coroutine)
                self._task.add_done_callback(self._ended)
                for _ in range(self._requests):
                    self._task.cancel(self._cancel_message)
        elif waits_for is None:
            self._loop.call_soon(self.step)
        else:
            waits_for._asyncio_future_blocking = False
            waits_for.add_done_callback(self._happened)
            self._waits_for = waits_for
            if self._must_cancel and waits_for.cancel(self._cancel_message):
                self._must_cancel = False

    def _happened(self, future: asyncio.Future[Any]) -> None:
        if future is not self._waits_for:
            return
        try:
            future.result()
        except BaseException as error:  # noqa: BLE001  # it is raised in the coroutine
            self.step(error)
        else:
            self.step()

    def _end(self) -> None:
        self._coroutine = None
        self._on_end(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "an inline task failed", "exception": error, "task": task})
        self._on_end(self)

    # --- as a task of asyncio's ---

    def cancel(self, msg: Any | None = None) -> bool:
        """Raise `CancelledError` where the coroutine waits, in the loop's next turn. False if it is over."""
        if self._task is not None:
            return self._task.cancel(msg)
        if self._coroutine is None:
            return False
        self._requests += 1
        waits_for = self._waits_for
        if waits_for is not None and type(waits_for) is not Signal and waits_for.cancel(msg):
            return True
        self._must_cancel, self._cancel_message = True, msg
        if waits_for is not None:
            self._loop.call_soon(self._cancelled)
        return True

    def _cancelled(self) -> None:
        # Otherwise it has gone on meanwhile, or will: a future that is done steps it itself.
        if self._must_cancel and type(self._waits_for) is Signal:
            self._waits_for._inline = None
            self.step()

    def uncancel(self) -> int:
        """Take back a request to cancel. Returns how many there still are."""
        if self._task is not None:
            return self._task.uncancel()
        if self._requests:
            self._requests -= 1
        return self._requests
