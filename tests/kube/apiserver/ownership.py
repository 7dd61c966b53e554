"""Who set which field: `managedFields`, server-side apply and its conflicts.

Modelled: the rules of structured-merge-diff. Checked against the real server by `test_conformance_apply.py`;
invariants for any sequence of writes by `test_ownership.py`. Not modelled: the order in which a list has the items of
two managers (here first what is applied, then the rest).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tests.kube.apiserver.errors import ApiError, Cause
from tests.kube.apiserver.fieldsets import (
    Field,
    Fields,
    compare,
    decode,
    encode,
    fields_of,
    is_granular,
    item_element,
    show,
    with_parents,
)
from tests.kube.apiserver.schema import Node, child

Object = dict[str, Any]


@dataclass(frozen=True)
class Manager:
    """A writer, as `managedFields` tells writers apart."""

    name: str
    operation: str
    """Apply or Update."""
    subresource: str = ""


@dataclass(frozen=True)
class Entry:
    """What one manager owns; `rendered` is the entry as it was read, as long as nothing of it changed."""

    fields: Fields
    api_version: str
    time: str
    rendered: dict[str, Any] | None = None


Owned = dict[Manager, Entry]


def owned(obj: Object) -> Owned:
    """Who owns what, as an object's `managedFields` say."""
    found = {}
    for raw in obj["metadata"].get("managedFields") or ():
        if not raw.get("manager") and not raw.get("fieldsV1"):
            continue
        manager = Manager(raw.get("manager", ""), raw.get("operation", "Update"), raw.get("subresource", ""))
        found[manager] = Entry(decode(raw.get("fieldsV1") or {}), raw.get("apiVersion", ""), raw.get("time", ""), raw)
    return found


def record(obj: Object, owners: Owned) -> None:
    """Write `managedFields`; managers that own nothing are left out, applied entries come first."""
    listed = []
    for manager, entry in sorted(owners.items(), key=lambda o: (o[0].operation, o[1].time, o[0].name)):
        if not entry.fields:
            continue
        raw = entry.rendered
        if raw is None:
            raw = {
                "manager": manager.name, "operation": manager.operation, "apiVersion": entry.api_version,
                "time": entry.time, "fieldsType": "FieldsV1", "fieldsV1": encode(entry.fields),
            }  # fmt: skip
            if manager.subresource:
                raw["subresource"] = manager.subresource
        listed.append(raw)
    obj["metadata"].pop("managedFields", None)
    if listed:
        obj["metadata"]["managedFields"] = listed


def _changed(entry: Entry, fields: Fields) -> Entry:
    return entry if fields == entry.fields else replace(entry, fields=fields, rendered=None)


def within(fields: Fields, subresource: str) -> Fields:
    """The fields a write to this subresource (or to the object itself) may own."""
    if subresource == "status":
        return {f for f in fields if f[0] == "f:status" or f[:2] == ("f:metadata", "f:annotations")}
    return {f for f in fields if f[0] != "f:status"}


def after_update(
    old: Object | None, new: Object, node: Node, manager: Manager, owners: Owned, api_version: str, now: str,
    has_status: bool,
) -> Owned:  # fmt: skip
    """The owners after a create, update or patch: who changes a field owns it, alone."""
    removed: Fields = set()
    if old is None:
        changed = fields_of(new, node)
    else:
        changed, removed = compare(old, new, node)
    result = {}
    for other, entry in owners.items():
        lost = removed if other == manager else removed | changed
        result[other] = _changed(entry, entry.fields - lost) if lost else entry
    gained = within(changed, manager.subresource) if has_status else changed
    if gained:
        before = result.get(manager)
        fields = gained | before.fields if before else gained
        result[manager] = Entry(fields, api_version, now)
    return result


def merge_applied(live: Any, applied: Any, node: Node) -> Any:
    """The live value with what is applied laid over it. Neither is changed; the result shares parts with both."""
    if isinstance(applied, dict) and isinstance(live, dict) and is_granular(applied, node):
        result = dict(live)
        for name, value in applied.items():
            known = child(node, name)
            if name in live and known is not None and is_granular(value, known) and is_granular(live[name], known):
                result[name] = merge_applied(live[name], value, known)
            else:
                result[name] = value
        return result
    if isinstance(applied, list) and isinstance(live, list) and is_granular(applied, node):
        wanted = {item_element(item, node): item for item in applied}
        kept = {item_element(item, node): item for item in live}
        order = [*wanted, *(element for element in kept if element not in wanted)]
        return [
            merge_applied(kept[e], wanted[e], node.items)  # type: ignore[arg-type]
            if e in wanted and e in kept and isinstance(wanted[e], dict)
            else wanted.get(e, kept.get(e))
            for e in order
        ]
    return applied


def remove_fields(obj: Any, node: Node, gone: Fields, kept: Fields, path: Field = ()) -> Any:
    """The value without the fields of `gone`; what lies in them and in `kept` stays. The argument is not changed."""
    if isinstance(obj, dict):
        result = {}
        for name, value in obj.items():
            where = (*path, f"f:{name}")
            known = child(node, name)
            if where in gone and where not in kept:
                continue
            if known is not None and isinstance(value, dict | list) and is_granular(value, known):
                result[name] = remove_fields(value, known, gone, kept, where)
            else:
                result[name] = value
        return result
    items = []
    for item in obj:
        where = (*path, item_element(item, node))
        if where in gone and where not in kept:
            continue
        items.append(remove_fields(item, node.items, gone, kept, where) if isinstance(item, dict) else item)  # type: ignore[arg-type]
    return items


def apply(
    live: Object | None, applied: Object, node: Node, manager: Manager, api_version: str, now: str, *,
    force: bool, has_status: bool,
) -> tuple[Object, Owned]:  # fmt: skip
    """Server-side apply. Returns the object, which shares parts with both, and its owners.

    Raises `ApiError` 409 for conflicts.
    """
    owners = owned(live) if live is not None else {}
    wanted = fields_of(applied, node)
    if has_status:
        wanted = within(wanted, manager.subresource)
    if live is None:
        return applied, {manager: Entry(wanted, api_version, now)}
    merged = merge_applied(live, applied, node)
    before = owners[manager].fields if manager in owners else set()
    others = {other: entry for other, entry in owners.items() if other != manager}
    # An object always has metadata: its name is applied with it, though nobody owns that.
    gone = with_parents(before) - with_parents(wanted) - {("f:metadata",)}
    if gone:
        kept = with_parents(set().union(*(entry.fields for entry in others.values())) | wanted)
        merged = remove_fields(merged, node, gone, kept)
    changed, removed = compare(live, merged, node)
    clashes = {other: entry.fields & changed for other, entry in others.items()}
    clashes = {other: fields for other, fields in clashes.items() if fields}
    if clashes and not force:
        raise conflicts(clashes, owners)
    result = {
        other: _changed(entry, entry.fields - removed - clashes.get(other, set())) for other, entry in others.items()
    }
    own = owners.get(manager)
    result[manager] = own if own is not None and own.fields == wanted else Entry(wanted, api_version, now)
    return merged, result


def conflicts(clashes: dict[Manager, Fields], owners: Owned) -> ApiError:
    """409 that names each manager and each field."""
    causes = []
    groups = []
    for manager, fields in sorted(clashes.items(), key=lambda c: c[0].name):
        entry = owners[manager]
        who = f'conflict with "{manager.name}"'
        if manager.subresource:
            who += f' with subresource "{manager.subresource}"'
        if manager.operation == "Update":
            who += f" using {entry.api_version}"
            who += f" at {entry.time}" if entry.time else ""
        shown = sorted(show(field) for field in fields)
        causes += [Cause(field, who, "FieldManagerConflict") for field in shown]
        groups.append((who, shown))
    return ApiError(409, f"Apply failed with {_counted(causes)}: {_listed(groups)}", "Conflict", {
        "causes": [{"reason": c.reason, "message": c.message, "field": c.field} for c in causes],
    })  # fmt: skip


def _counted(causes: list[Cause]) -> str:
    return "1 conflict" if len(causes) == 1 else f"{len(causes)} conflicts"


def _listed(groups: Iterable[tuple[str, list[str]]]) -> str:
    groups = list(groups)
    if len(groups) == 1 and len(groups[0][1]) == 1:
        return f"{groups[0][0]}: {groups[0][1][0]}"
    lines = []
    for who, fields in groups:
        lines.append(who.replace("conflict with", "conflicts with", 1) + ":")
        lines += [f"- {field}" for field in fields]
    return "\n".join(lines)
