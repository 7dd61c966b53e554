"""How many pods of a component exist, and how many should."""

from __future__ import annotations

from dataclasses import dataclass

from controller.objects.names import Component
from controller.status import raw
from controller.status.observed import Observed, best_report
from controller.status.pods import still_serving

TOLERATED_SHARE = 4
"""One pod in so many, and always one, may be missing before a component counts as unavailable."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The Deployment of a component in figures."""

    component: Component
    name: str
    exists: bool
    wanted: int
    replicas: int
    """Pods that the Deployment has, old and new."""
    ready: int
    serving: int
    """Pods that get requests: the ready ones or, when there are none, those that terminate and still serve, as a
    Service chooses its endpoints (KEP-1669)."""
    updated: int
    """Pods of the current template."""
    available: int
    current: bool
    """Whether the Deployment controller has seen the Deployment as it is now."""
    stalled: str
    """The Deployment controller's message when a rollout has exceeded its deadline, else empty."""

    @property
    def needed(self) -> int:
        """How many must be ready for the component to be available."""
        return max(1, self.wanted - max(1, self.wanted // TOLERATED_SHARE))

    @property
    def available_enough(self) -> bool:
        """Whether enough are ready for the component to be available."""
        return self.wanted > 0 and self.ready >= self.needed

    @property
    def ready_summary(self) -> str:
        """`3 of 4 workers are ready`. Pods in excess of those wanted, during a rolling update, do not count."""
        verb = "is" if self.wanted == 1 else "are"
        return f"{min(self.ready, self.wanted)} of {count(self.wanted, self.component)} {verb} ready"

    def figures(self) -> dict[str, int | str]:
        """As in the status. `summary` is for the column of `kubectl get`, which can only show one field."""
        return {
            "summary": f"{self.ready}/{self.wanted}",
            "wanted": self.wanted,
            "replicas": self.replicas,
            "ready": self.ready,
            "updated": self.updated,
            "available": self.available,
        }


def count(number: int, noun: str) -> str:
    """`1 worker`, `4 workers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def workload(observed: Observed, component: Component) -> Workload:
    """The workload of one component."""
    if observed.external and component is Component.WORKER:
        return _told_by_routers(observed)
    deployment = observed.deployments.get(component)
    asked = raw.at(deployment, "spec", "replicas")
    of_deployment = asked if type(asked) is int else 1 if deployment is not None else 0
    progress = raw.condition(deployment, "Progressing")
    ready = raw.number(deployment, "status", "readyReplicas")
    stalled = progress.get("status") == "False" and progress.get("reason") == "ProgressDeadlineExceeded"
    return Workload(
        component=component,
        name=f"{observed.name}-{component}",
        exists=deployment is not None,
        wanted=_wanted(observed, component, of_deployment),
        replicas=raw.number(deployment, "status", "replicas"),
        ready=ready,
        serving=ready or still_serving(observed.pods, component),
        updated=raw.number(deployment, "status", "updatedReplicas"),
        available=raw.number(deployment, "status", "availableReplicas"),
        current=raw.number(deployment, "status", "observedGeneration")
        >= raw.number(deployment, "metadata", "generation"),
        stalled=raw.text(progress, "message") if stalled else "",
    )


def _told_by_routers(observed: Observed) -> Workload:
    """Workers that somebody else runs, as the router knows them that knows most. All that it finds are wanted: there is
    no other number."""
    best = best_report(observed)
    known, ready = (best.workers_known, best.workers_ready) if best is not None else (0, 0)
    return Workload(
        component=Component.WORKER,
        name=f"{observed.name}-{Component.WORKER}",
        exists=True,
        wanted=known,
        replicas=known,
        ready=ready,
        serving=ready,
        updated=known,
        available=ready,
        current=True,
        stalled="",
    )


def _wanted(observed: Observed, component: Component, of_deployment: int) -> int:
    if component is Component.WORKER:
        if observed.workers_wanted is not None:
            return observed.workers_wanted
        if observed.deployments.get(component) is None and observed.spec is not None:
            return observed.spec.workers.replicas
        return of_deployment
    return observed.spec.router.replicas if observed.spec is not None else of_deployment
