"""Kubernetes events about a KVCluster."""

from __future__ import annotations

from datetime import datetime

from controller.objects.names import Object
from controller.status.transitions import EventNote

COMPONENT = "kvcluster-controller"
MAX_MESSAGE = 1024


def event_object(cluster: Object, note: EventNote, now: datetime, instance: str) -> Object:
    """A core/v1 Event. `instance` names this controller process."""
    metadata = cluster["metadata"]
    moment = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # An event's name becomes too long before its cluster's does.
        "metadata": {"generateName": f"{metadata['name']}-", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": cluster["apiVersion"],
            "kind": cluster["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message if len(note.message) <= MAX_MESSAGE else note.message[: MAX_MESSAGE - 3] + "...",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": instance,
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
