"""Objects, their versions, and what happened to them since when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from tests.kube.apiserver.errors import gone

Object = dict[str, Any]
ResourceKey = tuple[str, str]
"""Group and plural."""
Name = tuple[str, str]
"""Namespace (empty for objects of the cluster) and name."""


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """One version of one object. `obj` is never changed; whoever wants to change it takes a `copy`."""

    obj: Object
    raw: bytes
    revision: int

    def copy(self) -> Object:
        return orjson.loads(self.raw)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """What happened to one object: `old` is None when it was created, `new` when it was deleted.

    A deletion shows the object's last state at the revision of the deletion, as `last`.
    """

    revision: int
    key: ResourceKey
    name: Name
    old: Stored | None
    new: Stored | None
    last: Stored


Listener = Callable[[Change], None]


class Store:
    """Every object of a cluster, with one monotonic revision over all of them."""

    def __init__(self, history: int = 5_000) -> None:
        self.revision = 1
        self._objects: dict[ResourceKey, dict[Name, Stored]] = {}
        self._history: deque[Change] = deque(maxlen=history)
        self._forgotten = 1
        """Watches can begin at this revision or later."""
        self._listeners: list[Listener] = []
        self._latest: dict[ResourceKey, int] = {}

    def get(self, key: ResourceKey, name: Name) -> Stored | None:
        return self._objects.get(key, {}).get(name)

    def all(self, key: ResourceKey, namespace: str = "") -> Iterator[Stored]:
        """The objects of a resource in the order of their names; of every namespace when none is given."""
        objects = self._objects.get(key, {})
        names = sorted(n for n in objects if n[0] == namespace) if namespace else sorted(objects)
        return (objects[name] for name in names)

    def at(self, revision: int, key: ResourceKey, namespace: str = "") -> list[Stored]:
        """The objects of a resource as they were at a revision. Raises `ApiError` 410 when that is no longer known."""
        if revision < self._forgotten:
            raise gone("The provided resource version is too old to serve an exact list.")
        then: dict[Name, Stored | None] = {}
        for change in reversed(self._history):
            if change.revision <= revision:
                break
            if change.key == key:
                then[change.name] = change.old
        objects = {**self._objects.get(key, {}), **then}
        known = ((name, stored) for name, stored in sorted(objects.items()) if not namespace or name[0] == namespace)
        return [stored for _, stored in known if stored is not None]

    def every(self) -> Iterator[tuple[ResourceKey, Name, Stored]]:
        for key, objects in list(self._objects.items()):
            for name, stored in list(objects.items()):
                yield key, name, stored

    def put(self, key: ResourceKey, name: Name, obj: Object) -> Stored:
        """Create or replace an object; its resourceVersion is set here."""
        objects = self._objects.setdefault(key, {})
        stored = self._stored(obj)
        old = objects.get(name)
        objects[name] = stored
        self._note(Change(stored.revision, key, name, old, stored, stored))
        return stored

    def reread(self, key: ResourceKey, name: Name, obj: Object) -> None:
        """Show an object otherwise than it was stored, as a new schema makes the server do; nothing happened to it."""
        revision = self._objects[key][name].revision
        self._objects[key][name] = Stored(obj, orjson.dumps(obj), revision)

    def delete(self, key: ResourceKey, name: Name, last_state: Object | None = None) -> Stored:
        """Remove an object. Returns its last state (the given one, else as stored) at the revision of its removal."""
        old = self._objects[key].pop(name)
        last = self._stored(last_state or old.copy())
        self._note(Change(last.revision, key, name, old, None, last))
        return last

    def _stored(self, obj: Object) -> Stored:
        self.revision += 1
        obj["metadata"]["resourceVersion"] = str(self.revision)
        return Stored(obj, orjson.dumps(obj), self.revision)

    def _note(self, change: Change) -> None:
        if len(self._history) == self._history.maxlen:
            self._forgotten = self._history[0].revision
        self._history.append(change)
        self._latest[change.key] = change.revision
        for listener in list(self._listeners):
            listener(change)

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def unsubscribe(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def since(self, revision: int, key: ResourceKey) -> list[Change]:
        """What happened to a resource after a revision. Raises `ApiError` 410 when that is no longer known."""
        if revision < self._forgotten:
            raise gone(f"too old resource version: {revision} ({self._forgotten})")
        return [change for change in self._history if change.revision > revision and change.key == key]

    def latest(self, key: ResourceKey) -> int:
        """The revision of the last change of a resource that is known; 0 without one."""
        return self._latest.get(key, 0)

    def compact(self) -> None:
        """Forget the past: watches and continued lists from before now are answered with 410."""
        self._history.clear()
        self._forgotten = self.revision

    @property
    def oldest(self) -> int:
        return self._forgotten
