"""Events that the API server did not take are created again, once, and their number is bounded.

Not covered: which events a change of the status gives (tests/controller/status/test_transitions).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from controller.reconcile.events import MAX_PENDING, EventRecorder
from controller.status.transitions import EventNote
from runtime.kube.errors import KubeApiError

KEY = ("ns", "rag")
BODY = {
    "apiVersion": "kvcluster.dev/v1alpha1",
    "kind": "KVCluster",
    "metadata": {"name": "rag", "namespace": "ns", "uid": "u", "resourceVersion": "7"},
}


class Server:
    """Takes events by name; `failures` are what it answers first, having taken the event where `takes` says so."""

    def __init__(self, *failures: KubeApiError, takes: bool = False) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self._failures = list(failures)
        self._takes = takes

    async def create(self, path: str, manifest: dict[str, Any]) -> None:
        assert path == "/api/v1/namespaces/ns/events"
        name = manifest["metadata"]["name"]
        if name in self.events:
            raise KubeApiError(409, "AlreadyExists", "it exists")
        if self._failures:
            if self._takes:
                self.events[name] = manifest
            raise self._failures.pop(0)
        self.events[name] = manifest

    @property
    def reasons(self) -> list[str]:
        return [each["reason"] for each in self.events.values()]


def recorder(server: Server) -> EventRecorder:
    return EventRecorder(server, lambda: datetime(2026, 1, 1, tzinfo=UTC), "me")  # type: ignore[arg-type]


def note(reason: str) -> EventNote:
    return EventNote("Normal", reason, f"because of {reason}")


@pytest.mark.parametrize("takes", [False, True], ids=["not taken", "taken, though the answer was lost"])
async def test_a_failed_creation_is_repeated(takes: bool):
    server = Server(KubeApiError(503, "ServiceUnavailable", "not now"), takes=takes)
    events = recorder(server)
    events.record(BODY, [note("Serving"), note("AllReady")])
    with pytest.raises(KubeApiError):
        await events.flush(KEY)
    await events.flush(KEY)
    assert server.reasons == ["Serving", "AllReady"]
    await events.flush(KEY)
    assert server.reasons == ["Serving", "AllReady"]


async def test_an_event_that_is_refused_for_good_holds_up_no_other():
    server = Server(KubeApiError(403, "Forbidden", "the namespace is being terminated"))
    events = recorder(server)
    events.record(BODY, [note("Serving"), note("AllReady")])
    await events.flush(KEY)
    assert server.reasons == ["AllReady"]


async def test_pending_events_of_a_forgotten_cluster_are_dropped():
    server = Server(KubeApiError(500, "InternalError", "no"))
    events = recorder(server)
    events.record(BODY, [note("Serving")])
    with pytest.raises(KubeApiError):
        await events.flush(KEY)
    events.forget(KEY)
    await events.flush(KEY)
    assert server.reasons == []


async def test_what_waits_is_bounded():
    server = Server()
    events = recorder(server)
    events.record(BODY, [note(f"R{number}") for number in range(MAX_PENDING + 5)])
    await events.flush(KEY)
    assert server.reasons == [f"R{number}" for number in range(5, MAX_PENDING + 5)]
