"""What the controller has observed of a KVCluster: with the time, the only input of its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.api.model import KVClusterSpec
from controller.objects.names import Component
from controller.status import raw
from controller.status.pods import active, is_ready
from controller.status.raw import Raw
from controller.status.reasons import ConditionReason
from controller.status.report import RouterReport


@dataclass(frozen=True, slots=True)
class ReconcileProblem:
    """Something that kept the controller from bringing about what the spec asks for."""

    reason: ConditionReason
    """One of `RECONCILE_PROBLEMS`."""
    object: str
    """`Kind/name` of the object it is about (`Service/rag-router`), or the field of the spec."""
    message: str
    """What was found, in words for people. For a refusal, the API server's own words."""


@dataclass(frozen=True, slots=True)
class RouterReports:
    """The answers of the routers that were asked for their reports, by router pod: a report or an error."""

    reports: Mapping[str, RouterReport] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    """Why a router gave no report, in words."""

    @property
    def asked(self) -> bool:
        """Whether any router was asked."""
        return bool(self.reports or self.errors)


@dataclass(frozen=True, slots=True)
class Observed:
    """A KVCluster and the objects that belong to it, at one moment."""

    name: str
    namespace: str
    generation: int
    """metadata.generation of the KVCluster."""
    spec: KVClusterSpec | None
    """None when the spec is invalid. What runs then still gets a status."""
    deployments: Mapping[str, Raw | None] = field(default_factory=dict)
    """By component (`worker`, `router`); None or absent while there is none."""
    pods: tuple[Raw, ...] = ()
    """All pods of the cluster, of both components."""
    routers: RouterReports = field(default_factory=RouterReports)
    autoscaler: Raw | None = None
    """The HorizontalPodAutoscaler or ScaledObject of the workers."""
    problems: tuple[ReconcileProblem, ...] = ()
    service: Raw | None = None
    """The Service in front of the routers."""
    ingress: Raw | None = None
    """The Ingress in front of that Service."""
    pool: Raw | None = None
    """The InferencePool of the workers."""
    external: bool = False
    """Whether somebody else runs the workers. Then their pods are not among `pods`, and the routers tell of them."""
    workers_wanted: int | None = None
    """How many workers the spec asks for; None while an autoscaler owns the number."""


def best_report(observed: Observed) -> RouterReport | None:
    """The report of the router, ready or not, that has most workers; None: no router could be asked."""
    reports = observed.routers.reports.values()
    return max(reports, key=lambda report: (report.workers_ready, report.workers_known), default=None)


def ready_reports(observed: Observed) -> list[RouterReport]:
    """The reports of the routers that are ready."""
    ready = [raw.name(pod) for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
    reports = observed.routers.reports
    return [reports[name] for name in ready if name in reports]
