"""Events, which have two shapes: that of the core group, in which they are stored, and that of events.k8s.io."""

from __future__ import annotations

from typing import Any

import orjson

from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Stored

Object = dict[str, Any]

_NEWER = {
    "involvedObject": "regarding", "message": "note", "reportingComponent": "reportingController",
    "source": "deprecatedSource", "firstTimestamp": "deprecatedFirstTimestamp",
    "lastTimestamp": "deprecatedLastTimestamp", "count": "deprecatedCount",
}  # fmt: skip
_CORE = {newer: core for core, newer in _NEWER.items()}


def to_core(obj: Object) -> Object:
    return {**{_CORE.get(name, name): value for name, value in obj.items()}, "apiVersion": "v1"}


def to_newer(obj: Object) -> Object:
    shown = {_NEWER.get(name, name): value for name, value in obj.items()}
    return {**shown, "apiVersion": "events.k8s.io/v1"}


def is_newer(resource: Resource) -> bool:
    return resource.group == "events.k8s.io"


def raw(resource: Resource, stored: Stored) -> bytes:
    """An object's JSON in the shape of the resource it is asked for as."""
    return orjson.dumps(to_newer(stored.obj)) if is_newer(resource) else stored.raw
