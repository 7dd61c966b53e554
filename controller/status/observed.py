"""What the controller knows of a KVCluster at one moment: the only input of its status besides the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from controller.api.model import KVClusterSpec
from controller.status.report import ReportError, RouterReport, parse_report

__all__ = ["Observed", "Problem", "ProblemKind", "ReportError", "RouterReport", "parse_report"]

Raw = Mapping[str, Any]
"""An object as the API server gave it."""


class ProblemKind(StrEnum):
    """What kept the controller from bringing about what the spec asks for."""

    INVALID_SPEC = "InvalidSpec"
    """The spec breaks a rule that the CRD's schema cannot hold. `object` is the field's path."""
    NAME_CONFLICT = "NameConflict"
    """An object with one of our names exists and belongs to someone else; it is left alone."""
    APPLY_FAILED = "ApplyFailed"
    """The API server refused an object: a quota, missing rights, an admission webhook."""
    MISSING_API = "MissingApi"
    """The spec asks for an object of a kind this cluster does not have (ScaledObject, PodMonitor, HTTPRoute)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that was found while checking or applying."""

    kind: ProblemKind
    object: str
    """`Kind/name` of the object it is about (`Service/rag-router`), or the field of the spec."""
    message: str
    """What was found, in words for people; for a refusal the API server's own."""


@dataclass(frozen=True)
class Observed:
    """A KVCluster and what belongs to it, at one moment."""

    name: str
    namespace: str
    generation: int
    """metadata.generation of the KVCluster."""
    spec: KVClusterSpec | None
    """None when the spec is invalid: what runs then still gets a status."""
    deployments: Mapping[str, Raw | None] = field(default_factory=dict)
    """By component (`worker`, `router`); None or absent while there is none."""
    pods: tuple[Raw, ...] = ()
    """All pods of the cluster, of both components."""
    reports: Mapping[str, RouterReport | str] = field(default_factory=dict)
    """By router pod: its report, or in words why it could not be asked. A router that was not asked is absent."""
    autoscaler: Raw | None = None
    """The HorizontalPodAutoscaler or ScaledObject of the workers."""
    problems: tuple[Problem, ...] = ()
    service: Raw | None = None
    """The Service in front of the routers."""
    ingress: Raw | None = None
    """The Ingress in front of that Service."""
    workers_wanted: int | None = None
    """How many workers the spec asks for; None while an autoscaler owns the number."""
