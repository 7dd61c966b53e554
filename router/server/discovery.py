"""Where the list of workers comes from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from kvcache.logs import event

logger = logging.getLogger(__name__)

Membership = Mapping[str, bool]
"""URL of every worker there is -> whether it takes new requests (False: it is terminating)."""


class WorkerUrlError(ValueError):
    """Not the URL of a worker; the message says why."""


class Discovery(Protocol):
    """A source of workers."""

    def watch(self) -> AsyncIterator[Membership]:
        """The membership now, and again whenever it changes. It ends when it can no longer change."""


def worker_url(text: str) -> str:
    """A worker's base URL in the form that names it everywhere: scheme, host, port. Raises `WorkerUrlError`."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise WorkerUrlError(f"{text!r:.200} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise WorkerUrlError(f"{text!r:.200} is not a worker's URL: it looks like http://host:port, without a path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


class StaticDiscovery:
    """A list that never changes."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._members = {worker_url(url): True for url in urls}

    async def watch(self) -> AsyncIterator[Membership]:
        yield self._members


class FileDiscovery:
    """A text file with one URL a line; empty lines and what follows a # do not count.

    It is read again every `interval` seconds. While it is missing or holds a bad line the last good list stays.
    """

    def __init__(self, path: Path, interval: float = 0.5) -> None:
        self._path = path
        self._interval = interval

    async def watch(self) -> AsyncIterator[Membership]:
        last: Membership | None = None
        problem = ""
        while True:
            try:
                members = self._read()
            except (OSError, UnicodeDecodeError, WorkerUrlError) as error:
                if str(error) != problem:
                    problem = str(error)
                    event(logger, logging.ERROR, "workers_file_unusable", path=str(self._path), why=problem)
            else:
                problem = ""
                if members != last:
                    last = members
                    yield members
            await asyncio.sleep(self._interval)

    def _read(self) -> Membership:
        lines = (line.partition("#")[0].strip() for line in self._path.read_text("utf-8").splitlines())
        return {worker_url(line): True for line in lines if line}
