"""Reads InferencePools, InferenceObjectives and the pods of a pool. docs/gateway.md, "The workers of an InferencePool",
says what counts and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.endpointslices import FEED_PORT

POOL_KIND = "InferencePool"
POOL_GROUPS = ("inference.networking.k8s.io", "inference.networking.x-k8s.io", "llm-d.ai")
"""What references of objectives name: the last is what llm-d's CRD takes for the group where none is stated."""
MAX_TARGET_PORTS = 8
"""As many target ports as the API has. Further ones are not looked at."""
ENDED = frozenset({"Failed", "Succeeded"})


class Pool(NamedTuple):
    """What an InferencePool says of its workers."""

    labels: tuple[tuple[str, str], ...]
    """Labels of its pods, sorted; empty: it selects none."""
    ports: tuple[int, ...]
    """Each is an endpoint, hence a worker, in each pod."""
    own_labels: Mapping[str, str]
    """Labels of the pool itself, by which objectives may select it."""

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


class Requirement(NamedTuple):
    """What a label has to be, as one `matchExpressions` of Kubernetes says it."""

    key: str
    operator: str
    values: frozenset[str]

    def holds(self, labels: Mapping[str, str]) -> bool:
        """As of `In`, `NotIn`, `Exists` and `DoesNotExist`; nothing meets an operator that is none of them."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels
            case _:
                return False


class Objective(NamedTuple):
    """An InferenceObjective."""

    pools: frozenset[str]
    """Names of the pools that it is for."""
    priority: int
    selector: tuple[Requirement, ...] | None = None
    """The labels of further pools that it is for; empty: of any; None: no others."""

    def is_for(self, pool: str, labels: Mapping[str, str] | None) -> bool:
        """Whether it is for this pool; `labels`: the pool's own, None if they are not known."""
        if pool in self.pools:
            return True
        return self.selector is not None and labels is not None and all(each.holds(labels) for each in self.selector)


def read_pool(found: Mapping[str, Any]) -> Pool:
    """The pool in an InferencePool object. Raises `TypeError`, `KeyError`, `AttributeError` or `ValueError` for what is
    none."""
    spec = found["spec"]
    labels = spec["selector"].get("matchLabels") or {}
    ports = [int(port["number"]) for port in spec["targetPorts"]]
    own = found["metadata"].get("labels") or {}
    return Pool(tuple(sorted(labels.items())), tuple(dict.fromkeys(ports))[:MAX_TARGET_PORTS], dict(own))


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

    It has a `poolRef`, `poolRefs` or a `poolSelector`, and is for what any of them names (llm-d-router 0.10). A
    reference is to an InferencePool of either group, because its default differs between the projects that define the
    kind; one of another kind is to none.
    """
    spec = found["spec"]
    priority = spec.get("priority")
    references = (spec.get("poolRef") or {}, *(spec.get("poolRefs") or ()))
    named = (each.get("name") or "" for each in references if _is_to_a_pool(each))
    selector = spec.get("poolSelector")
    requirements = None if selector is None else _requirements(selector)
    return Objective(frozenset(filter(None, named)), priority if isinstance(priority, int) else 0, requirements)


def _is_to_a_pool(reference: Mapping[str, Any]) -> bool:
    return (reference.get("kind") or POOL_KIND) == POOL_KIND and (
        reference.get("group") or POOL_GROUPS[0]
    ) in POOL_GROUPS


def _requirements(selector: Mapping[str, Any]) -> tuple[Requirement, ...]:
    equal = (Requirement(key, "In", frozenset({value})) for key, value in (selector.get("matchLabels") or {}).items())
    further = (
        Requirement(each["key"], each["operator"], frozenset(each.get("values") or ()))
        for each in selector.get("matchExpressions") or ()
    )
    return (*equal, *further)


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


def priorities_of(
    pool: str, labels: Mapping[str, str] | None, objectives: Iterable[tuple[str, Objective]]
) -> dict[str, int]:
    """The priorities of the objectives of this pool, by name; `labels`: the pool's own, None if they are not known."""
    return {name: objective.priority for name, objective in objectives if objective.is_for(pool, labels)}
