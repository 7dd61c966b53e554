"""A source of live documents that tests write."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson

from kvcluster.top.sources import SourceError
from router.live.document import Live, encode
from router.live.updates import difference

Step = bytes | Exception | Callable[[], Awaitable[object]]
"""A piece of the stream, how it breaks off, or something to wait for."""


def whole(document: Live) -> bytes:
    return b"event: live\ndata: " + encode(document) + b"\n\n"


def change(old: Live, new: Live) -> bytes:
    return b"event: update\ndata: " + orjson.dumps(difference(old, new)) + b"\n\n"


@dataclass
class ScriptedSource:
    """Each connection plays the next script, and ends; after the last one connections are refused."""

    scripts: Sequence[Sequence[Step]]
    title: str = "http://router:9000"
    paths: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, path: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        self.paths.append(path)
        if len(self.paths) > len(self.scripts):
            raise SourceError("nobody answers")
        yield self._play(self.scripts[len(self.paths) - 1])

    async def _play(self, script: Sequence[Step]) -> AsyncIterator[bytes]:
        for step in script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, bytes):
                yield step
            else:
                await step()
