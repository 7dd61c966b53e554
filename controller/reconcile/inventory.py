"""The inventory: the last known state of KVClusters and of the objects that belong to them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from controller.kube.kinds import KVCLUSTER, Kind
from controller.objects.names import INSTANCE_LABEL, Object

Key = tuple[str, str]
"""(namespace, name) of a KVCluster."""

REMEMBERED_DELETIONS = 16_384
"""How many deletions are remembered against states that arrive late: about 3 MB, more than happen in a minute."""


@dataclass(frozen=True, slots=True)
class Ref:
    """One object, by kind and name."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.name}/{self.name}"


def owner_of(item: Object) -> Key | None:
    """The KVCluster that an object belongs to, by its label."""
    metadata = item["metadata"]
    name = (metadata.get("labels") or {}).get(INSTANCE_LABEL)
    return (metadata["namespace"], name) if name else None


class Inventory:
    """Objects by kind and by the KVCluster they belong to, from watches, from lists, and from the answers to writes.

    Invariant: an object belongs to at most one KVCluster. An older state never replaces a newer one, and no state from
    before an object's deletion brings the object back. resourceVersion says which of two states is older.
    """

    def __init__(self) -> None:
        self._items: dict[Ref, Object] = {}
        self._owned: defaultdict[Key, set[Ref]] = defaultdict(set)
        self._deleted: OrderedDict[str, str] = OrderedDict()
        """By uid: the resourceVersion as of which an object was gone; the last `REMEMBERED_DELETIONS` of them."""
        self._changes = 0
        self._revisions: dict[Key, int] = {}

    def revision(self, key: Key) -> int:
        """A number that differs after each change of this KVCluster or of an object that belongs to it."""
        return self._revisions.get(key, 0)

    def get(self, kind: Kind, key: Key) -> Object | None:
        """The object of this kind at (namespace, name)."""
        return self._items.get(Ref(kind, *key))

    def owned(self, key: Key) -> Iterator[tuple[Ref, Object]]:
        """All objects labelled as this cluster's, pods included, in a stable order."""
        for ref in sorted(self._owned.get(key, ()), key=str):
            yield ref, self._items[ref]

    def keys(self, kind: Kind) -> list[Key]:
        """(namespace, name) of all objects of a kind."""
        return [(ref.namespace, ref.name) for ref in self._items if ref.kind == kind]

    def put(self, kind: Kind, item: Object) -> bool:
        """Takes in the state of an object. False when it is the one that is held, or an older one."""
        metadata = item["metadata"]
        ref = Ref(kind, metadata["namespace"], metadata["name"])
        held, deleted = self._items.get(ref), self._deleted.get(metadata["uid"])
        if held is not None and not _newer(item, held):
            return False
        if deleted is not None and not _after(metadata["resourceVersion"], deleted):
            return False
        self._forget(ref)
        self._items[ref] = item
        if (owner := owner_of(item)) is not None:
            self._owned[owner].add(ref)
        self._changed(ref, owner)
        return True

    def drop(self, kind: Kind, item: Object) -> bool:
        """Takes in the deletion of an object. False when it is not held, or another one is under its name."""
        metadata = item["metadata"]
        ref = Ref(kind, metadata["namespace"], metadata["name"])
        self._remember_deletion(metadata["uid"], metadata["resourceVersion"])
        held = self._items.get(ref)
        if held is None or held["metadata"]["uid"] != metadata["uid"]:
            return False
        self._forget(ref)
        return True

    def replace(self, kind: Kind, namespace: str | None, items: Iterable[Object], version: str) -> set[Key]:
        """Takes in a complete list as of `version`, of one namespace or of all (None). The clusters that changed.

        This makes up for a deletion that a watch lost: an object that is not listed is gone, unless it came later.
        """
        listed = {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in items}
        changed: set[Key] = set()
        for key in self.keys(kind):
            gone = self._items[Ref(kind, *key)]
            written_later = _is_later(gone["metadata"]["resourceVersion"], version)
            if namespace in (None, key[0]) and key not in listed and not written_later:
                changed.add(owner_of(gone) or key)
                self._remember_deletion(gone["metadata"]["uid"], version)
                self._forget(Ref(kind, *key))
        for key, item in listed.items():
            held = self._items.get(Ref(kind, *key))
            if self.put(kind, item):
                changed |= {owner_of(each) or key for each in (held, item) if each is not None}
        return changed

    def _remember_deletion(self, uid: str, version: str) -> None:
        """A list from before the object's deletion may still arrive."""
        known = self._deleted.pop(uid, version)
        # A deletion found by asking for the object has no version of its own, only that of the last known state.
        self._deleted[uid] = known if _is_later(known, version) else version
        if len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    def _forget(self, ref: Ref) -> None:
        held = self._items.pop(ref, None)
        owner = owner_of(held) if held is not None else None
        if owner is not None:
            self._owned[owner].discard(ref)
            if not self._owned[owner]:
                del self._owned[owner]
        self._changed(ref, owner)

    def _changed(self, ref: Ref, owner: Key | None) -> None:
        self._changes += 1
        if ref.kind == KVCLUSTER:
            self._revisions[ref.namespace, ref.name] = self._changes
        if owner is not None:
            self._revisions[owner] = self._changes

    def forget(self, key: Key) -> None:
        """The cluster is gone: forgets its revision."""
        self._revisions.pop(key, None)


def _newer(item: Object, held: Object) -> bool:
    mine, theirs = item["metadata"], held["metadata"]
    if mine["uid"] != theirs["uid"] and not (mine["resourceVersion"].isdigit() and theirs["resourceVersion"].isdigit()):
        return True
    return _after(mine["resourceVersion"], theirs["resourceVersion"])


def _after(version: str, other: str) -> bool:
    # Comparable as numbers since KEP-5504. Where they are not numbers, the state that arrives last is the newest.
    if version.isdigit() and other.isdigit():
        return int(version) > int(other)
    return version != other


def _is_later(version: str, other: str) -> bool:
    return version.isdigit() and other.isdigit() and int(version) > int(other)
