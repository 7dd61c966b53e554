"""Parts of the manifest that are Kubernetes' own, under its names: where pods run and how they are exposed."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from controller.api.base import CLUSTER_ONLY, SpecModel

_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|Mi|Gi|Ti|M|G|T)?")


def _quantity(value: object) -> str:
    text = str(value)
    if _QUANTITY.fullmatch(text) is None:
        raise PydanticCustomError("quantity", "must be a quantity such as 500m, 2 or 4Gi")
    return text


Quantity = Annotated[str, BeforeValidator(_quantity), Field(json_schema_extra={"x-kubernetes-int-or-string": True})]
"""An amount as Kubernetes writes it; a number counts as its digits."""


class Resources(SpecModel):
    """Compute resources of a container."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    """What is reserved, by resource name (cpu, memory, nvidia.com/gpu)."""
    limits: dict[str, Quantity] = Field(default_factory=dict)
    """What may be used at most, by resource name."""


class Toleration(SpecModel):
    """A node's taint that a pod accepts."""

    key: str | None = None
    """Key of the taint; all keys when absent."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether the value must be equal, or the key merely exist."""
    value: str | None = None
    """Value of the taint, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; all effects when absent."""
    toleration_seconds: int | None = None
    """How long a `NoExecute` taint is tolerated."""


class PodMetadata(SpecModel):
    """Labels and annotations added to pods."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels to add."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations to add."""


PullPolicy = Literal["Always", "IfNotPresent", "Never"]

RawObject = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""Passed on to Kubernetes as it is."""


class Placement(SpecModel):
    """Where pods may run and what they get there."""

    resources: Annotated[Resources, CLUSTER_ONLY] = Resources()
    """Resources of each pod's container."""
    node_selector: Annotated[dict[str, str], CLUSTER_ONLY] = Field(default_factory=dict)
    """Labels a node must have."""
    tolerations: Annotated[list[Toleration], CLUSTER_ONLY] = Field(default_factory=list)
    """Taints that are accepted."""
    affinity: Annotated[RawObject, CLUSTER_ONLY] = Field(default_factory=dict)
    """Kubernetes affinity, passed on as it is."""
    topology_spread_constraints: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Kubernetes topology spread constraints, passed on as they are. Default: spread over nodes where possible."""
    priority_class_name: Annotated[str | None, CLUSTER_ONLY] = None
    """PriorityClass of the pods."""
    pod_metadata: Annotated[PodMetadata, CLUSTER_ONLY] = PodMetadata()
    """Labels and annotations added to each pod."""


class NetworkPolicy(SpecModel):
    """Who may open connections to the pods."""

    enabled: bool = False
    """Let only routers and scrapers reach the workers, and only the controller and scrapers the management port."""
    scrapers: list[RawObject] = Field(default_factory=list, max_length=64)
    """Peers that may scrape metrics, as a NetworkPolicy writes them (namespaceSelector, podSelector, ipBlock)."""
    clients: list[RawObject] = Field(default_factory=list, max_length=64)
    """Peers that may send requests to the routers. Default: everyone."""


class Monitoring(SpecModel):
    """How Prometheus finds the pods."""

    pod_monitor: bool = False
    """Create a PodMonitor, where the Prometheus operator's CRD is installed."""
    pod_monitor_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the PodMonitor: a Prometheus selects its monitors by them."""
    interval_seconds: Annotated[int, Field(ge=1, le=3_600)] = 15
    """How often the PodMonitor has the pods scraped."""
    scrape_annotations: bool = False
    """Annotate the pods with `prometheus.io/scrape`, `port` and `path`."""
