"""Requests that are with a worker right now: who is waiting for whom, since when, and how to stop waiting."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.upstream.interface import Cause, UpstreamError

NOT_WAITING = float("inf")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may be silent. Seconds.

    A worker that gives signs of life (its feed, its /health) may think for long; one that gives none is most likely
    frozen for a moment, and what it has computed is lost if its requests move at once.
    """

    answer: float
    """Before it begins an answer, while it lives."""
    idle: float
    """Within an answer, while it lives."""
    stall: float
    """Without any sign of life, before what it has not begun to answer goes elsewhere."""
    cut: float
    """Without any sign of life, before answers it has begun are cut off."""


class Attempt:
    """One request at one worker."""

    __slots__ = ("answered", "cause", "since", "task", "url", "why")

    def __init__(self, url: str, task: asyncio.Task[object], now: float) -> None:
        self.url = url
        self.task = task
        self.since = now
        """Since when the worker has been silent; `NOT_WAITING` while it is the client we wait for."""
        self.answered = False
        """The client has got a byte: the request can no longer go elsewhere."""
        self.cause: Cause | None = None
        self.why = ""

    def give_up(self, cause: Cause, why: str) -> None:
        """Stop waiting: the task that holds this attempt gets `UpstreamError(cause)`."""
        if self.cause is None:
            self.cause, self.why = cause, why
            self.task.cancel(why)


class Attempts:
    """All attempts, by worker. No timer a request: `sweep` looks at all of them a few times a second."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._open: defaultdict[str, set[Attempt]] = defaultdict(set)

    @contextmanager
    def at(self, url: str, task: asyncio.Task[object], now: float) -> Iterator[Attempt]:
        """The request that `task` (the caller) handles is at `url`. Raises `UpstreamError` when it is given up."""
        attempt = Attempt(url, task, now)
        self._open[url].add(attempt)
        try:
            yield attempt
        except asyncio.CancelledError:
            if attempt.cause is None or task.uncancel() > 0:
                raise  # the client left, or we are shutting down
            raise UpstreamError(attempt.cause, attempt.why) from None
        finally:
            attempts = self._open[url]
            attempts.discard(attempt)
            if not attempts:
                del self._open[url]

    def give_up(self, url: str, cause: Cause, why: str) -> None:
        """There is nothing to wait for any more: what the worker has not begun to answer goes elsewhere."""
        for attempt in list(self._open.get(url, ())):
            if not attempt.answered:
                attempt.give_up(cause, why)

    def sweep(self, now: float, silence: Callable[[str, float], float]) -> None:
        """Give up on workers that have been silent for too long. `silence(url, now)`: seconds for which a worker has
        given no sign of life; 0 while it does."""
        patience = self._patience
        for url, attempts in self._open.items():
            silent = silence(url, now)
            for attempt in list(attempts):
                stalled = patience.cut if attempt.answered else patience.stall
                limit = patience.idle if attempt.answered else patience.answer
                # Pieces of an answer are signs of life too, of a worker too busy for its /health.
                if min(silent, now - attempt.since) > stalled:
                    attempt.give_up(Cause.STALLED, f"the worker gave no sign of life for {stalled:g} s")
                elif now - attempt.since > limit:
                    attempt.give_up(Cause.TIMEOUT, f"the worker sent nothing for {limit:g} s")

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._open.values())
