"""Which writes bring a cluster's objects in line with its spec: pure functions of what is desired and what exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controller.kube.kinds import DEPLOYMENT, OWNED, Kind, kind_of
from controller.objects.names import APPLIED_HASH, FIELD_MANAGER, Object
from controller.reconcile.inventory import Ref
from controller.status.raw import is_terminating

Written = Mapping[Ref, tuple[str, str]]
"""What was applied last -> (digest of the manifest, fingerprint of the server's answer)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The writes to make, in order. Objects that belong to someone else are left alone."""

    apply: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()
    conflicts: tuple[tuple[Ref, str], ...] = ()
    """(object, whose it is): names that we need and that are taken."""
    create: bool = False
    """Whether an object of `apply` does not exist yet, as far as is known."""
    missing: tuple[Ref, ...] = ()
    """Desired objects whose kind the API server does not know."""


def plan(
    uid: str,
    desired: Iterable[Object],
    live: Mapping[Ref, Object],
    written: Written,
    absent: Collection[Kind] = (),
) -> Plan:
    """The plan for the KVCluster with this uid.

    `live` are the objects that exist under its label, `absent` the kinds that the API server does not know.
    """
    apply: list[Object] = []
    conflicts: list[tuple[Ref, str]] = []
    missing: list[Ref] = []
    wanted: set[Ref] = set()
    for manifest in desired:
        ref = ref_of(manifest)
        wanted.add(ref)
        current = live.get(ref)
        if ref.kind in absent:
            missing.append(ref)
        elif current is not None and (owner := foreign_owner(current, uid)) is not None:
            conflicts.append((ref, owner))
        elif current is None or not in_sync(manifest, current, written.get(ref)):
            apply.append(manifest)
    delete = [
        current
        for ref, current in live.items()
        if ref.kind in OWNED
        and ref not in wanted
        and foreign_owner(current, uid) is None
        and not is_terminating(current)
    ]
    return Plan(
        apply=tuple(apply),
        delete=tuple(delete),
        conflicts=tuple(conflicts),
        create=any(ref_of(manifest) not in live for manifest in apply),
        missing=tuple(missing),
    )


def ref_of(manifest: Object) -> Ref:
    """The object's kind and name."""
    return Ref(kind_of(manifest), manifest["metadata"]["namespace"], manifest["metadata"]["name"])


def foreign_owner(item: Object, uid: str) -> str | None:
    """Whose the object is, in words; None when it belongs to the KVCluster with this uid."""
    owners = [owner for owner in item["metadata"].get("ownerReferences") or () if owner.get("controller")]
    if any(owner["uid"] == uid for owner in owners):
        return None
    if owners:
        return f"belongs to {owners[0]['kind']} {owners[0]['name']} (uid {owners[0]['uid']})"
    return "belongs to no KVCluster"


def replicas_to_hand_over(manifest: Object, current: Object | None, initial: int) -> int | None:
    """How many replicas another field manager has to state before `manifest`, which states none, is applied.

    When we stop stating `replicas` and nobody else does, server-side apply removes the field and the default, 1, comes
    back: switching an autoscaler on would end all workers but one. None: nothing to do. `initial` is for a Deployment
    that does not exist yet.
    """
    if kind_of(manifest) != DEPLOYMENT or "replicas" in manifest["spec"]:
        return None
    if current is None:
        return initial
    others = (
        entry
        for entry in current["metadata"].get("managedFields") or ()
        if not (entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply")
    )
    if any("f:replicas" in (entry.get("fieldsV1") or {}).get("f:spec", {}) for entry in others):
        return None
    replicas: int = current["spec"].get("replicas", initial)
    return replicas


# --- whether a live object still is what was applied: fields that we do not state do not count ---


def in_sync(manifest: Object, current: Object, written: tuple[str, str] | None) -> bool:
    """Whether nothing has to be applied.

    The manifest must be the one that was applied last, and the object must still have what it states: as it states it,
    or as the server stored it when it was applied (a quantity of 1000m becomes 1, a webhook adds its own).
    """
    stamp = manifest["metadata"]["annotations"][APPLIED_HASH]
    if (current["metadata"].get("annotations") or {}).get(APPLIED_HASH) != stamp:
        return False
    if covers(current, manifest):
        return True
    return written == (stamp, fingerprint(current, manifest))


def has_drifted(manifest: Object, before: Object | None, after: Object, written: tuple[str, str] | None) -> bool:
    """Whether applying `manifest` undid what someone else had done: it had been applied before, and the object was gone
    (`before` is None), or says something else at the places that the manifest states than it did.

    Without `written`, as after a start, an object that the server stores in another form than ours is applied once
    more; that changes nothing, and is no drift.
    """
    stamp = manifest["metadata"]["annotations"][APPLIED_HASH]
    known = written is not None and written[0] == stamp
    if before is None:
        return known
    known = known or (before["metadata"].get("annotations") or {}).get(APPLIED_HASH) == stamp
    return known and fingerprint(before, manifest) != fingerprint(after, manifest)


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
    if _have_names(live, wanted):
        named = {item["name"]: item for item in live}
        return all(item["name"] in named and covers(named[item["name"]], item) for item in wanted)
    return len(live) == len(wanted) and all(map(covers, live, wanted))


def _have_names(live: list[Any], wanted: list[Any]) -> bool:
    return bool(wanted) and all(type(item) is dict and "name" in item for item in (*wanted, *live))


def fingerprint(live: Object, wanted: Object) -> str:
    """A digest of what `live` says at the places that `wanted` states. It changes when someone changes one of them."""
    return hashlib.sha256(json.dumps(_projection(live, wanted), sort_keys=True).encode()).hexdigest()


def _projection(live: Any, wanted: Any) -> Any:
    """What `live` says at the places that `wanted` states: how the server stored our values."""
    match wanted:
        case dict() if type(live) is dict:
            return {name: _projection(live.get(name), value) for name, value in wanted.items()}
        case list() if type(live) is list:
            if _have_names(live, wanted):
                named = {item["name"]: item for item in live}
                return [_projection(named.get(item["name"]), item) for item in wanted]
            if len(live) == len(wanted):
                return [_projection(*pair) for pair in zip(live, wanted, strict=True)]
            return live
        case _:
            return live
