"""Watches: what happened since a revision, then what happens, until the client goes or time is up.

Modelled: resuming, selection by labels and fields, streaming lists, bookmarks, the end of a watch, 410 for a version
that is too old. Checked against the real server by `test_conformance_watch.py`. Not modelled, and refused: tables.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from tests.kube.apiserver.errors import ApiError
from tests.kube.apiserver.store import Change, Object, ResourceKey, Store, Stored

INITIAL_END = "k8s.io/initial-events-end"


@dataclass(frozen=True)
class Selection:
    """Which objects of a resource a list or watch shows."""

    key: ResourceKey
    namespace: str
    matches: Callable[[Object], bool]

    def shows(self, stored: Stored | None) -> bool:
        if stored is None:
            return False
        if self.namespace and stored.obj["metadata"].get("namespace") != self.namespace:
            return False
        return self.matches(stored.obj)


def _event(kind: str, shown: bytes) -> bytes:
    return b'{"type":"' + kind.encode() + b'","object":' + shown + b"}\n"


def error_event(error: ApiError) -> bytes:
    return _event("ERROR", orjson.dumps(error.body()))


class Watch:
    """One watch. Iterating yields the lines of the answer; `cut` ends it as a broken connection would."""

    def __init__(
        self, store: Store, selection: Selection, *, bookmarks: bool, kind: tuple[str, str], bookmark_seconds: float,
    ) -> None:  # fmt: skip
        self._store = store
        self._selection = selection
        self._bookmarks = bookmarks
        self._kind = kind
        self._bookmark_seconds = bookmark_seconds
        self._pending: deque[Change] = deque()
        self._wake = asyncio.Event()
        self._begun = 0
        self._ending = False
        self.was_cut = False

    def cut(self) -> None:
        """End without an end of the body; what happened before is still told."""
        self.was_cut = self._ending = True
        self._wake.set()

    def _note(self, change: Change) -> None:
        if change.key == self._selection.key:
            self._pending.append(change)
            self._wake.set()

    def _line(self, change: Change) -> bytes:
        before, after = self._selection.shows(change.old), self._selection.shows(change.new)
        if after and change.new is not None:
            return _event("MODIFIED" if before else "ADDED", change.new.raw)
        if not before:
            return b""
        if change.new is None:
            return _event("DELETED", change.last.raw)
        # It left the selection: shown as it was, at the revision at which it left.
        gone = change.old.copy()  # type: ignore[union-attr]
        gone["metadata"]["resourceVersion"] = str(change.revision)
        return _event("DELETED", orjson.dumps(gone))

    def _bookmark(self, revision: int, *, initial: bool = False) -> bytes:
        api_version, kind = self._kind
        meta: dict[str, Any] = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial:
            meta["annotations"] = {INITIAL_END: "true"}
        bookmark = {"kind": kind, "apiVersion": api_version, "metadata": meta}
        return _event("BOOKMARK", orjson.dumps(bookmark))

    def _progress(self) -> bytes:
        """A bookmark, if anything happened to the resource since the watch began: others are not told of."""
        latest = self._store.latest(self._selection.key)
        return self._bookmark(latest) if latest > self._begun else b""

    async def lines(
        self, since: int | None, seconds: float, *, initial_end: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """The events after a revision; None begins with every object there is."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        self._begun = self._store.revision if since is None else since
        try:
            changes = [] if since is None else self._store.since(since, self._selection.key)
        except ApiError as error:
            yield error_event(error)
            return
        first = b""
        if since is None:
            shown = (
                s for s in self._store.all(self._selection.key, self._selection.namespace) if self._selection.shows(s)
            )
            first = b"".join(_event("ADDED", s.raw) for s in shown)
            if initial_end:
                first += self._bookmark(self._store.revision, initial=True)
        self._pending.extend(changes)
        self._store.subscribe(self._note)
        try:
            if first:
                yield first
            async for chunk in self._until(end, loop):
                yield chunk
        finally:
            self._store.unsubscribe(self._note)

    async def _until(self, end: float, loop: asyncio.AbstractEventLoop) -> AsyncIterator[bytes]:
        next_bookmark = loop.time() + self._bookmark_seconds
        while True:
            if self._pending:
                chunk = b"".join(self._line(change) for change in self._pending)
                self._pending.clear()
                if chunk:
                    yield chunk
                continue
            now = loop.time()
            if self._ending or now >= end:
                if self._bookmarks and not self.was_cut and (last := self._progress()):
                    yield last
                return
            if self._bookmarks and now >= next_bookmark:
                next_bookmark = now + self._bookmark_seconds
                if progress := self._progress():
                    yield progress
                continue
            self._wake.clear()
            deadline = min(end, next_bookmark) if self._bookmarks else end
            timer = loop.call_at(deadline, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
