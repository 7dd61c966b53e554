"""What has to be written so that a cluster's objects are as they should be: a pure function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.kube.kinds import DEPLOYMENT, OWNED, Kind, kind_of
from controller.objects.names import APPLIED_HASH, Object
from controller.reconcile.inventory import Ref

Written = Mapping[Ref, tuple[str, str]]
"""What was applied last -> (digest of the manifest, fingerprint of the server's answer)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Writes, in order; objects that are someone else's are left alone."""

    apply: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()
    conflicts: tuple[tuple[Ref, str], ...] = ()
    """(object, whose it is) for names of ours that are taken."""
    create: bool = False
    """Whether an object of `apply` does not exist, as far as is known."""
    missing: tuple[Ref, ...] = ()
    """Objects that are wanted, but whose kind the cluster does not have."""


def plan(
    uid: str,
    desired: Iterable[Object],
    live: Mapping[Ref, Object],
    written: Written,
    absent: Collection[Kind] = (),
) -> Plan:
    """`uid` is the KVCluster's, `live` what exists under its label and under the names of `desired`; `absent` are kinds
    that the API server does not know."""
    work = _Work()
    wanted: set[Ref] = set()
    for manifest in desired:
        ref = ref_of(manifest)
        wanted.add(ref)
        current = live.get(ref)
        if ref.kind in absent:
            work.missing.append(ref)
        elif current is not None and (owner := foreign_owner(current, uid)) is not None:
            work.conflicts.append((ref, owner))
        elif current is None or not in_sync(manifest, current, written.get(ref)):
            work.apply.append(manifest)
    for ref, current in live.items():
        if ref.kind in OWNED and ref not in wanted and foreign_owner(current, uid) is None and not leaving(current):
            work.delete.append(current)
    return Plan(
        apply=tuple(work.apply),
        delete=tuple(work.delete),
        conflicts=tuple(work.conflicts),
        create=any(ref_of(manifest) not in live for manifest in work.apply),
        missing=tuple(work.missing),
    )


@dataclass(slots=True)
class _Work:
    apply: list[Object] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    conflicts: list[tuple[Ref, str]] = field(default_factory=list)
    missing: list[Ref] = field(default_factory=list)


def ref_of(manifest: Object) -> Ref:
    """The object's kind and name."""
    return Ref(kind_of(manifest), manifest["metadata"]["namespace"], manifest["metadata"]["name"])


def leaving(item: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in item["metadata"]


def foreign_owner(item: Object, uid: str) -> str | None:
    """In words whose the object is, unless it is the KVCluster's with this uid."""
    owners = [owner for owner in item["metadata"].get("ownerReferences") or () if owner.get("controller")]
    if any(owner["uid"] == uid for owner in owners):
        return None
    if owners:
        return f"belongs to {owners[0]['kind']} {owners[0]['name']} (uid {owners[0]['uid']})"
    return "belongs to no KVCluster"


def in_sync(manifest: Object, current: Object, written: tuple[str, str] | None) -> bool:
    """Whether nothing has to be applied.

    The manifest must be the one that was applied last, and the object must still have what it states: as it states it,
    or as the server wrote it down when it was applied (a quantity of 1000m becomes 1, a webhook adds its own).
    """
    stamp = manifest["metadata"]["annotations"][APPLIED_HASH]
    if (current["metadata"].get("annotations") or {}).get(APPLIED_HASH) != stamp:
        return False
    if covers(current, manifest):
        return True
    return written == (stamp, fingerprint(current, manifest))


def replicas_to_hand_over(manifest: Object, current: Object | None, initial: int) -> int | None:
    """How many replicas to state in a manager of their own before `manifest`, which states none, is applied.

    When we stop stating `replicas` and nobody else does, server-side apply takes the field away and the default, 1,
    comes back: all workers but one would go as soon as an autoscaler is switched on. None: nothing to do.
    """
    if kind_of(manifest) != DEPLOYMENT or "replicas" in manifest["spec"]:
        return None
    if current is None:
        return initial
    if any("f:replicas" in (entry.get("fieldsV1") or {}).get("f:spec", {}) for entry in _others(current)):
        return None
    replicas: int = current["spec"].get("replicas", initial)
    return replicas


def _others(current: Object) -> Iterable[Object]:
    return (
        entry
        for entry in current["metadata"].get("managedFields") or ()
        if not (entry.get("manager") == "kvcluster" and entry.get("operation") == "Apply")
    )


def covers(live: Any, wanted: Any) -> bool:
    """Whether `live` has everything that `wanted` states.

    Lists whose items have names are compared name by name, as server-side apply merges them; others item by item.
    """
    match wanted:
        case dict():
            return type(live) is dict and all(
                name in live and covers(live[name], value) for name, value in wanted.items()
            )
        case list():
            return type(live) is list and _list_covers(live, wanted)
        case _:
            return bool(live == wanted)


def _list_covers(live: list[Any], wanted: list[Any]) -> bool:
    if wanted and all(type(item) is dict and "name" in item for item in (*wanted, *live)):
        named = {item["name"]: item for item in live}
        return all(item["name"] in named and covers(named[item["name"]], item) for item in wanted)
    return len(live) == len(wanted) and all(map(covers, live, wanted))


def projection(live: Any, wanted: Any) -> Any:
    """What `live` says at the places that `wanted` states: how the server wrote our values down."""
    match wanted:
        case dict() if type(live) is dict:
            return {name: projection(live.get(name), value) for name, value in wanted.items()}
        case list() if type(live) is list:
            if wanted and all(type(item) is dict and "name" in item for item in (*wanted, *live)):
                named = {item["name"]: item for item in live}
                return [projection(named.get(item["name"]), item) for item in wanted]
            if len(live) == len(wanted):
                return [projection(*pair) for pair in zip(live, wanted, strict=True)]
            return live
        case _:
            return live


def fingerprint(live: Object, wanted: Object) -> str:
    """Digest of `projection`: equal as long as nobody changed what we stated."""
    return hashlib.sha256(json.dumps(projection(live, wanted), sort_keys=True).encode()).hexdigest()
