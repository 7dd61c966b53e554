"""The stream of events on virtual time: documents are made once a second for all viewers together, and not at all
without one; a slow viewer is never behind by more than one event.

Not covered: the events on real connections, and how many there may be (`test_endpoints`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from router.live.broadcast import Broadcast
from router.live.document import Live, decode
from router.live.updates import applied, decode_update
from runtime.http.event_stream import KEEP_ALIVE, KEEP_ALIVE_INTERVAL
from runtime.sse import SseReader
from tests.router.live import sample
from tests.virtual import CountingLoop, run


class Source:
    """Documents that differ in one figure. `takes`: seconds that each takes to make."""

    def __init__(self, takes: float = 0.0) -> None:
        self.takes = takes
        self.made = 0
        self.fails = False

    async def __call__(self) -> Live:
        await asyncio.sleep(self.takes)
        if self.fails:
            raise RuntimeError("no document")
        self.made += 1
        document = sample.live(4, steps=2, decisions=0)
        worker = replace(document.workers[0], requests=self.made)
        return replace(document, at=document.at + self.made, workers=(worker, *document.workers[1:]))


class Viewer:
    """Reads the stream as a page does."""

    def __init__(self, broadcast: Broadcast) -> None:
        self.stream: AsyncGenerator[bytes] = broadcast.events()
        self.document: Live | None = None
        self.names: list[str] = []

    async def take(self) -> None:
        """Take the next piece of the stream."""
        piece = await anext(self.stream)
        if piece == KEEP_ALIVE:
            self.names.append("comment")
        for event in SseReader(1 << 20).feed(piece):
            self.names.append(event.name)
            if event.name == "live":
                self.document = decode(event.data)
            else:
                assert self.document is not None
                self.document = applied(self.document, decode_update(event.data))

    async def read(self, seconds: float) -> None:
        """Take all that comes in so many seconds."""
        reading = asyncio.create_task(self._read())
        await asyncio.sleep(seconds)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            await self.take()

    def requests(self) -> int:
        assert self.document is not None
        return self.document.workers[0].requests


def test_nothing_is_made_without_a_viewer() -> None:
    async def main(loop: CountingLoop) -> None:
        source = Source()
        broadcast = Broadcast(source)
        await asyncio.sleep(60)
        assert source.made == 0
        viewer = Viewer(broadcast)
        await viewer.read(2.5)
        assert (source.made, broadcast.viewers) == (3, 0)
        await asyncio.sleep(60)
        assert source.made == 3

    run(main)


def test_every_viewer_gets_each_update_and_none_costs_more() -> None:
    async def main(loop: CountingLoop) -> None:
        source = Source()
        broadcast = Broadcast(source)
        viewers = [Viewer(broadcast) for _ in range(5)]
        await asyncio.gather(*(viewer.read(4.5) for viewer in viewers))
        assert source.made == 5
        for viewer in viewers:
            assert viewer.names == ["live", *["update"] * 4]
            assert viewer.requests() == 5

    run(main)


def test_a_viewer_that_missed_updates_gets_a_whole_document() -> None:
    async def main(loop: CountingLoop) -> None:
        source = Source()
        broadcast = Broadcast(source)
        fast, slow = Viewer(broadcast), Viewer(broadcast)
        for _ in range(2):
            await slow.take()
        reading = asyncio.create_task(fast.read(4.5))
        await asyncio.sleep(4.4)
        await slow.take()
        assert slow.names == ["live", "live"]
        assert slow.requests() == source.made
        await slow.take()
        assert slow.names == ["live", "live", "update"]
        await reading
        await slow.stream.aclose()

    run(main)


def test_a_stream_without_news_stays_alive_by_comments() -> None:
    async def main(loop: CountingLoop) -> None:
        viewer = Viewer(Broadcast(Source(takes=2.5 * KEEP_ALIVE_INTERVAL)))
        await viewer.read(2.6 * KEEP_ALIVE_INTERVAL)
        assert viewer.names == ["comment", "comment", "live"]

    run(main)


def test_a_document_that_cannot_be_made_ends_the_streams(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: CountingLoop) -> None:
        source = Source()
        broadcast = Broadcast(source)
        viewer = Viewer(broadcast)
        await viewer.read(0.5)
        source.fails = True
        viewer = Viewer(broadcast)
        with pytest.raises(StopAsyncIteration):
            await viewer._read()
        source.fails = False
        viewer = Viewer(broadcast)
        await viewer.read(0.5)
        assert viewer.names == ["live"], "who connects again is served again"

    with caplog.at_level(logging.CRITICAL, "router.live.broadcast"):
        run(main)


def test_closing_ends_every_stream() -> None:
    async def main(loop: CountingLoop) -> None:
        broadcast = Broadcast(Source())
        viewer = Viewer(broadcast)
        reading = asyncio.create_task(viewer._read())
        await asyncio.sleep(1.5)
        broadcast.close()
        with pytest.raises(StopAsyncIteration):
            await reading
        assert loop.time() == 1.5
        late = Viewer(broadcast)
        with pytest.raises(StopAsyncIteration):
            await late._read()
        assert broadcast.viewers == 0

    run(main)
