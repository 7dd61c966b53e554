"""Sources of the list of workers: a static list and a file. `kubernetes` has the one for EndpointSlices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from runtime.logs import EventLogger

logger = EventLogger(__name__)


FEED = "feed="
"""Prefix of the URL of a worker's cache feed, if another process serves it."""


class WorkerUrlError(ValueError):
    """A text is not the URL of a worker. The message says why."""


@dataclass(frozen=True, slots=True)
class DiscoveryStatus:
    """How well a source knows the workers now. Times are in seconds."""

    source: str
    """`kubernetes`, `inference-pool`, `file` or `static`."""
    known: bool
    """The source has yielded its first list."""
    healthy: bool
    """The list is up to date. False: the last list that could be read is used."""
    age: float | None
    """Time since the list was last confirmed; None: it never was, or it cannot change."""
    error: str = ""
    """Why the list cannot be confirmed now; empty: it can."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed attempts to read or watch the list, by cause."""
    relists: Mapping[str, int] = field(default_factory=dict)
    """How often the whole list was read again, by reason."""

    def public(self) -> dict[str, object]:
        """The fields that `GET /status` and `GET /ready` show."""
        return {"source": self.source, "healthy": self.healthy, "age_seconds": self.age, "error": self.error}


class Discovery(Protocol):
    """A source of workers."""

    def status(self) -> DiscoveryStatus:
        """How well the source knows the workers now."""

    def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The workers now, and again whenever they change. It ends when they can no longer change."""


def worker_url(text: str) -> str:
    """A worker's base URL in the form that identifies it everywhere: scheme, host, port. Raises `WorkerUrlError`."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise WorkerUrlError(f"{text!r:.200} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise WorkerUrlError(f"{text!r:.200} is not a worker's URL: it looks like http://host:port, without a path")
    if parts.fragment:
        raise WorkerUrlError(
            f"{text!r:.200}: the data-parallel ranks of a worker are found by its feed: name its URL once"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def listed_workers(entries: Iterable[str]) -> DiscoveredWorkers:
    """Workers by URL. An entry is a worker's URL, or `feed=URL`, which gives the address of the previous worker's cache
    feed: that of an agent, beside an engine that has no feed of its own. Raises `WorkerUrlError`."""
    workers: dict[str, DiscoveredWorker] = {}
    last = None
    for entry in entries:
        if not entry.startswith(FEED):
            last = worker_url(entry)
            workers[last] = DiscoveredWorker()
        elif last is None or workers[last].feed is not None:
            raise WorkerUrlError(
                f"{entry!r:.200} follows no worker: it looks like http://engine:8100,feed=http://agent:8101"
            )
        else:
            feed = worker_url(entry.removeprefix(FEED))
            workers[last] = DiscoveredWorker(feed=None if feed == last else feed)
    return workers


def entries(workers: DiscoveredWorkers) -> Iterator[str]:
    """Inverse of `listed_workers`."""
    for url, worker in workers.items():
        yield url
        if worker.feed is not None:
            yield FEED + worker.feed


class StaticDiscovery:
    """A list that never changes, made of entries as `listed_workers` takes them."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._workers = listed_workers(entries)

    def status(self) -> DiscoveryStatus:
        return DiscoveryStatus("static", known=True, healthy=True, age=None)

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        yield self._workers


class FileDiscovery:
    """A text file with one worker a line, `URL` or `URL,feed=URL`. Empty lines, and text after a #, are ignored.

    It is read again every `interval` seconds. While it is missing or holds a bad line, the last good list is used.
    """

    def __init__(self, path: Path, interval: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._interval = interval
        self._clock = clock
        self._read_at: float | None = None
        self._problem = ""

    def status(self) -> DiscoveryStatus:
        age = None if self._read_at is None else self._clock() - self._read_at
        return DiscoveryStatus("file", age is not None, not self._problem and age is not None, age, self._problem)

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        last: DiscoveredWorkers | None = None
        while True:
            try:
                workers = self._read()
            except (OSError, UnicodeDecodeError, WorkerUrlError) as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    logger.error("workers_file_unusable", path=str(self._path), why=self._problem)
            else:
                self._problem = ""
                self._read_at = self._clock()
                if workers != last:
                    last = workers
                    yield workers
            await asyncio.sleep(self._interval)

    def _read(self) -> DiscoveredWorkers:
        lines = (line.partition("#")[0] for line in self._path.read_text("utf-8").splitlines())
        workers: dict[str, DiscoveredWorker] = {}
        for line in lines:
            workers.update(listed_workers(entry for part in line.split(",") if (entry := part.strip())))
        return workers
