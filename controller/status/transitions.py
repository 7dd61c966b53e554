"""Events about how a status differs from the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from controller.objects.names import Component
from controller.status import raw
from controller.status.reasons import ConditionReason, ConditionType

SCALED = "Scaled"
"""Reason of the event that more or fewer pods are wanted."""

_PRECEDENCE = (
    ConditionType.DEGRADED,
    ConditionType.WORKERS_AVAILABLE,
    ConditionType.ROUTER_AVAILABLE,
    ConditionType.CACHE_VIEW_FRESH,
    ConditionType.PROGRESSING,
    ConditionType.READY,
)
"""Where several conditions change for one reason, the event is about the first."""


@dataclass(frozen=True, slots=True)
class EventNote:
    """An event to be recorded about the KVCluster."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def events(previous: Mapping[str, Any] | None, current: Mapping[str, Any]) -> tuple[EventNote, ...]:
    """An event for each condition whose status or reason changed, and for each change of how many pods are wanted.

    Warnings come first. A change of a message alone is no event. Of a new KVCluster only conditions that are True are
    events: it is clear that nothing exists yet. One reason gives one event, however many conditions it changed.
    """
    notes: list[EventNote] = []
    found = [*_scalings(previous, current), *_transitions(previous, current)]
    for note in sorted(found, key=lambda note: note.type != "Warning"):
        if not any(_covers(other, note) for other in notes):
            notes.append(note)
    return tuple(notes)


def _covers(other: EventNote, note: EventNote) -> bool:
    if other.reason != note.reason:
        return False
    return other.type == "Warning" or note.message in other.message or other.message in note.message


def _conditions(status: Mapping[str, Any] | None) -> dict[str, raw.Raw]:
    return {raw.text(item, "type"): item for item in raw.objects(status, "conditions")}


def _transitions(previous: Mapping[str, Any] | None, current: Mapping[str, Any]) -> Iterator[EventNote]:
    before, after = _conditions(previous), _conditions(current)
    for kind in _PRECEDENCE:
        old, new = before.get(kind), after.get(kind)
        if new is None:
            continue
        if old is None and new.get("status") != "True":
            continue
        if old is not None and (old.get("status"), old.get("reason")) == (new.get("status"), new.get("reason")):
            continue
        yield EventNote(_type(kind, old, new), raw.text(new, "reason"), raw.text(new, "message"))


def _type(kind: ConditionType, old: raw.Raw | None, new: raw.Raw) -> Literal["Normal", "Warning"]:
    reason = raw.text(new, "reason")
    if any(reason == known and known.warning for known in ConditionReason):
        return "Warning"
    lost = kind is ConditionType.READY and old is not None and old.get("status") == "True" != new.get("status")
    return "Warning" if lost and reason != ConditionReason.SCALED_TO_ZERO else "Normal"


def _scalings(previous: Mapping[str, Any] | None, current: Mapping[str, Any]) -> Iterator[EventNote]:
    if previous is None:
        return
    for component in Component:
        was, wanted = (raw.at(status, f"{component}s", "wanted") for status in (previous, current))
        if type(was) is int and type(wanted) is int and was != wanted:
            yield EventNote("Normal", SCALED, f"{component}s: from {was} to {wanted}")
