"""Kubernetes events about a KVCluster: what they look like, and that each arrives once."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime

from controller.kube.client import ApiError, KubeClient
from controller.objects.names import Object
from controller.reconcile.inventory import Key
from controller.status.transitions import EventNote
from runtime.logs import event

logger = logging.getLogger(__name__)

COMPONENT = "kvcluster-controller"
MAX_MESSAGE = 1024
MOST_WAITING = 64
"""Events of one cluster that wait for an API server which takes them; the oldest go first."""


class Announcer:
    """Posts events, and posts again what did not arrive. `now` gives aware times; `instance` names this process."""

    def __init__(self, client: KubeClient, now: Callable[[], datetime], instance: str) -> None:
        self._client = client
        self._now = now
        self._instance = instance
        self._waiting: dict[Key, deque[Object]] = {}

    def add(self, body: Object, notes: Iterable[EventNote]) -> None:
        """These happened to this KVCluster just now; `tell` says so."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        for note in notes:
            event(logger, logging.INFO, "told", cluster="/".join(key), reason=note.reason, message=note.message)
            waiting = self._waiting.setdefault(key, deque(maxlen=MOST_WAITING))
            waiting.append(event_object(body, note, self._now(), self._instance))

    async def tell(self, key: Key) -> None:
        """Posts what waits. Raises the `ApiError` of a failure that may pass: what is left is posted the next time."""
        waiting = self._waiting.get(key, deque())
        while waiting:
            try:
                await self._client.create(f"/api/v1/namespaces/{key[0]}/events", waiting[0])
            except ApiError as error:
                arrived = error.reason == "AlreadyExists"  # an earlier post had arrived, though its answer was lost
                if error.passing and not arrived:
                    raise
                if not arrived:
                    event(logger, logging.WARNING, "event_refused", cluster="/".join(key), why=str(error))
            waiting.popleft()
        self._waiting.pop(key, None)

    def forget(self, key: Key) -> None:
        """The cluster is gone."""
        self._waiting.pop(key, None)


def event_object(cluster: Object, note: EventNote, now: datetime, instance: str) -> Object:
    """A core/v1 Event. `instance` names this controller process. Its name is a digest of what it says: posted a second
    time it is refused (AlreadyExists) instead of told twice."""
    metadata = cluster["metadata"]
    moment = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    said = "\n".join((metadata["uid"], metadata["resourceVersion"], moment, note.type, note.reason, note.message))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(said.encode()).hexdigest()[:16]}",
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
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": instance,
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
