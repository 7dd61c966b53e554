"""Reads InferencePools, InferenceObjectives and the pods of a pool. docs/gateway.md, "The workers of an InferencePool",
says what counts and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.endpointslices import FEED_PORT

MAX_TARGET_PORTS = 8
"""As many target ports as the API has. Further ones are not looked at."""
ENDED = frozenset({"Failed", "Succeeded"})


class Pool(NamedTuple):
    """What an InferencePool says of its workers."""

    labels: tuple[tuple[str, str], ...]
    """Labels of its pods, sorted; empty: it selects none."""
    ports: tuple[int, ...]
    """Each is an endpoint, hence a worker, in each pod."""

    @property
    def selector(self) -> str:
        """As the query parameter `labelSelector`."""
        return ",".join(f"{name}={value}" for name, value in self.labels)


class Pod(NamedTuple):
    """One pod of a pool."""

    name: str
    uid: str
    address: str
    """Empty: it has none yet."""
    intake: Intake
    feeds: Mapping[str, int]
    """Its ports whose name is `feed` or begins with `feed-`."""


class Objective(NamedTuple):
    """An InferenceObjective."""

    pools: frozenset[str]
    """Names of the pools that it is for."""
    priority: int


def read_pool(found: Mapping[str, Any]) -> Pool:
    """The pool in an InferencePool object. Raises `TypeError`, `KeyError`, `AttributeError` or `ValueError` for what is
    none."""
    spec = found["spec"]
    labels = spec["selector"].get("matchLabels") or {}
    ports = [int(port["number"]) for port in spec["targetPorts"]]
    return Pool(tuple(sorted(labels.items())), tuple(dict.fromkeys(ports))[:MAX_TARGET_PORTS])


def read_pod(found: Mapping[str, Any]) -> Pod:
    """What counts of a pod, with the states that an EndpointSlice would give it."""
    metadata, spec, status = found["metadata"], found.get("spec") or {}, found.get("status") or {}
    conditions = {each.get("type"): each.get("status") for each in status.get("conditions") or ()}
    ready = conditions.get("Ready") == "True"
    if metadata.get("deletionTimestamp"):
        intake = Intake.DRAINING if ready else Intake.CLOSED
    else:
        intake = Intake.OPEN if ready else Intake.CLOSED
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    feeds = {
        port["name"]: port["containerPort"]
        for container in containers
        for port in container.get("ports") or ()
        if (port.get("name") or "").partition("-")[0] == FEED_PORT
    }
    address = "" if status.get("phase") in ENDED else status.get("podIP") or ""
    return Pod(metadata["name"], metadata.get("uid") or "", address, intake, feeds)


def read_objective(found: Mapping[str, Any]) -> Objective:
    """The objective in an InferenceObjective object. Without a priority it has 0.

    It has one `poolRef`, or `poolRefs` where a newer version of the API has written it. References are by name: the
    default of their group differs between the projects that define the kind.
    """
    spec = found["spec"]
    priority = spec.get("priority")
    named = (each.get("name") or "" for each in (spec.get("poolRef") or {}, *(spec.get("poolRefs") or ())))
    return Objective(frozenset(filter(None, named)), priority if isinstance(priority, int) else 0)


def pool_workers(pool: Pool, pods: Iterable[Pod]) -> DiscoveredWorkers:
    """The workers of a pool: one for each target port of each pod that has an address.

    Two pods may have one address, for a moment while one replaces the other, or on a host's network: the one that takes
    requests counts.
    """
    workers: dict[str, DiscoveredWorker] = {}
    for pod in sorted(pods, key=lambda each: (each.intake, each.name)):
        if not pod.address:
            continue
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        for number, port in enumerate(pool.ports):
            feed = pod.feeds.get(f"{FEED_PORT}-{port}", pod.feeds.get(FEED_PORT) if number == 0 else None)
            base = None if feed in (None, port) else f"http://{host}:{feed}"
            workers.setdefault(f"http://{host}:{port}", DiscoveredWorker(pod.intake, base, pod.name, pod.uid))
    return dict(sorted(workers.items()))


def priorities_of(pool: str, objectives: Iterable[tuple[str, Objective]]) -> dict[str, int]:
    """The priorities of the objectives of this pool, by name."""
    return {name: objective.priority for name, objective in objectives if pool in objective.pools}
