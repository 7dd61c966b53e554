"""Requests that are with a worker right now: who is waiting for whom, since when, and how to stop waiting."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from router.server.upstream import Cause, UpstreamError

NOT_WAITING = float("inf")


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
    """All attempts, by worker. No timer a request: `sweep` looks at all of them a few times a second.

    `answer_timeout`: longest silence before an answer begins. `idle_timeout`: longest silence within one.
    """

    def __init__(self, *, answer_timeout: float, idle_timeout: float) -> None:
        self._answer_timeout = answer_timeout
        self._idle_timeout = idle_timeout
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

    def left(self, url: str, why: str) -> None:
        """The worker is no candidate any more: what it has not answered goes elsewhere."""
        for attempt in list(self._open.get(url, ())):
            if not attempt.answered:
                attempt.give_up(Cause.LEFT, why)

    def sweep(self, now: float) -> None:
        """Give up on workers that have been silent for too long."""
        for attempts in self._open.values():
            for attempt in list(attempts):
                limit = self._idle_timeout if attempt.answered else self._answer_timeout
                if now - attempt.since > limit:
                    attempt.give_up(Cause.TIMEOUT, f"the worker sent nothing for {limit:g} s")

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._open.values())
