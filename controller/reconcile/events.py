"""Kubernetes events about a KVCluster: what they look like, and that each is created exactly once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime

from controller.kube.client import KubeClient
from controller.objects.names import Object
from controller.reconcile.inventory import Key
from controller.status.transitions import EventNote
from runtime.kube.errors import KubeApiError
from runtime.logs import EventLogger

logger = EventLogger(__name__)

REPORTING_COMPONENT = "kvcluster-controller"
MAX_MESSAGE = 1024
MAX_PENDING = 64
"""Events of one cluster that are kept while the API server takes none; the oldest are dropped first."""


class EventRecorder:
    """Creates events, and tries again with those that did not arrive.

    `now` gives aware times; `instance` names this process.
    """

    def __init__(self, client: KubeClient, now: Callable[[], datetime], instance: str) -> None:
        self._client = client
        self._now = now
        self._instance = instance
        self._pending: dict[Key, deque[Object]] = {}

    def record(self, body: Object, notes: Iterable[EventNote]) -> None:
        """Notes what has just happened to this KVCluster, for the next `flush`."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        for note in notes:
            logger.info("event_recorded", cluster="/".join(key), reason=note.reason, message=note.message)
            pending = self._pending.setdefault(key, deque(maxlen=MAX_PENDING))
            pending.append(event_object(body, note, self._now(), self._instance))

    async def flush(self, key: Key) -> None:
        """Creates what is pending. Raises `KubeApiError` for a failure that may pass; the rest stays pending."""
        pending = self._pending.get(key, deque())
        while pending:
            try:
                await self._client.create(f"/api/v1/namespaces/{key[0]}/events", pending[0])
            except KubeApiError as error:
                arrived = error.reason == "AlreadyExists"  # an earlier request had succeeded, and its answer was lost
                if error.passing and not arrived:
                    raise
                if not arrived:
                    logger.warning("event_refused", cluster="/".join(key), why=str(error))
            pending.popleft()
        self._pending.pop(key, None)

    def forget(self, key: Key) -> None:
        """The cluster is gone: drops what is pending."""
        self._pending.pop(key, None)


def event_object(cluster: Object, note: EventNote, now: datetime, instance: str) -> Object:
    """A core/v1 Event about this KVCluster, reported by the controller process `instance`.

    Its name is a digest of its content, so that the API server refuses a second copy with AlreadyExists.
    """
    metadata = cluster["metadata"]
    moment = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    content = "\n".join((metadata["uid"], metadata["resourceVersion"], moment, note.type, note.reason, note.message))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(content.encode()).hexdigest()[:16]}",
            "namespace": metadata["namespace"],
        },
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
        "source": {"component": REPORTING_COMPONENT},
        "reportingComponent": REPORTING_COMPONENT,
        "reportingInstance": instance,
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
