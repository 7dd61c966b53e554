"""When each watch last showed that it is alive: it began, or brought an event or a bookmark (about one a minute)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import StreamReader


class WatchAges:
    """Ages in seconds of `clock`. A path is that of a URL at the API server: one kind, in one namespace or in all."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}

    def alive(self, path: str) -> None:
        """The watch at this path has just begun, or brought something."""
        self._seen[path] = self._clock()

    def gone(self, path: str) -> None:
        """The API server knows no such kind: there is nothing to watch."""
        self._seen.pop(path, None)

    def ages(self) -> dict[str, float]:
        """Seconds since the last sign of life, by resource (`pods`); of several namespaces, the one silent longest."""
        now = self._clock()
        ages: dict[str, float] = {}
        for path, seen in self._seen.items():
            resource = path.rpartition("/")[2]
            ages[resource] = max(now - seen, ages.get(resource, 0.0))
        return ages


class WatchedContent:
    """The body of a watch's answer. Calls `alive` for each chunk that kopf reads; all else is the body's own."""

    def __init__(self, content: StreamReader, alive: Callable[[], None]) -> None:
        self._content = content
        self._alive = alive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """As `aiohttp.StreamReader.iter_chunked`, by which kopf reads watches."""
        async for chunk in self._content.iter_chunked(size):
            self._alive()
            yield chunk
