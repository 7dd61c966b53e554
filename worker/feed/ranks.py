"""The cache feeds of a process with several data-parallel ranks: `?rank=r` names one, and without it it is that of rank
0."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qs

from kvcache.errors import ApiError
from worker.asgi import HttpRequest
from worker.feed.endpoints import SHUTTING_DOWN, FeedEndpoints


class RankedFeed:
    """GET /cache/state and GET /cache/events of every rank. `feeds` may grow and shrink; there is always one."""

    def __init__(self, feeds: Sequence[FeedEndpoints]) -> None:
        self._feeds = feeds

    async def state(self, request: HttpRequest, service: object) -> None:
        """The snapshot of a rank."""
        await self._asked(request).state(request, service)

    async def events(self, request: HttpRequest, service: object) -> None:
        """The stream of a rank."""
        await self._asked(request).events(request, service)

    def close(self, why: str = SHUTTING_DOWN) -> None:
        """See `FeedEndpoints.close`."""
        for feed in self._feeds:
            feed.close(why)

    def open(self) -> None:
        """See `FeedEndpoints.open`."""
        for feed in self._feeds:
            feed.open()

    def drop(self) -> None:
        """See `FeedEndpoints.drop`."""
        for feed in self._feeds:
            feed.drop()

    def _asked(self, request: HttpRequest) -> FeedEndpoints:
        if not request.query:
            return self._feeds[0]
        text = parse_qs(request.query).get("rank", ["0"])[0]
        if not (text.isascii() and text.isdecimal()):
            raise ApiError(400, f"rank must be a whole number, not {text!r:.80}", param="rank")
        rank = int(text[:9])
        if rank >= len(self._feeds):
            raise ApiError(404, f"rank {rank} is out of range [0, {len(self._feeds)}).", param="rank")
        return self._feeds[rank]
