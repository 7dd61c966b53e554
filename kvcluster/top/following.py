"""Follows a live document over lost connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto

from kvcluster.top.sources import Source, SourceError, documents
from router.live.document import Live
from runtime.backoff import Backoff

BACKOFF = Backoff(0.5, 10.0)


class ReaderState(Enum):
    """How a reader stands with the router whose document it follows."""

    CONNECTING = auto()
    FOLLOWING = auto()
    """What is shown is kept up to date."""
    WAITING = auto()
    """The connection was lost or refused. What is shown grows old until the next attempt, after a back-off."""


class ReaderEvent(Enum):
    """What moves it."""

    DOCUMENT = auto()
    LOST = auto()
    RETRIED = auto()


READER_TRANSITIONS: Mapping[tuple[ReaderState, ReaderEvent], ReaderState] = {
    (ReaderState.CONNECTING, ReaderEvent.DOCUMENT): ReaderState.FOLLOWING,
    (ReaderState.CONNECTING, ReaderEvent.LOST): ReaderState.WAITING,
    (ReaderState.FOLLOWING, ReaderEvent.DOCUMENT): ReaderState.FOLLOWING,
    (ReaderState.FOLLOWING, ReaderEvent.LOST): ReaderState.WAITING,
    (ReaderState.WAITING, ReaderEvent.RETRIED): ReaderState.CONNECTING,
}


@dataclass(frozen=True, slots=True)
class Link:
    """The state of the connection and the last document. Times are the event loop's."""

    state: ReaderState = ReaderState.CONNECTING
    document: Live | None = None
    received: float = 0.0
    """When the document came."""
    problem: str = ""
    """Why the connection was lost; empty while it is not."""
    retry_at: float | None = None
    """When the next attempt begins."""


async def follow(
    source: Source, *, chance: Callable[[], float] = random.random, backoff: Backoff = BACKOFF
) -> AsyncGenerator[Link]:
    """Every change of the link, for ever."""
    loop, link, failures = asyncio.get_running_loop(), Link(), 0
    while True:
        yield link
        problem = "the router ended the stream"
        try:
            async with aclosing(documents(source)) as stream:
                async for found in stream:
                    failures = 0
                    state = READER_TRANSITIONS[link.state, ReaderEvent.DOCUMENT]
                    link = Link(state, found, loop.time())
                    yield link
        except SourceError as error:
            problem = str(error)
        failures += 1
        delay = backoff.delay(failures, chance())
        state = READER_TRANSITIONS[link.state, ReaderEvent.LOST]
        link = Link(state, link.document, link.received, problem, loop.time() + delay)
        yield link
        await asyncio.sleep(delay)
        link = Link(READER_TRANSITIONS[link.state, ReaderEvent.RETRIED], link.document, link.received, problem)
