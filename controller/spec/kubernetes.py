"""Parts of the manifest that are Kubernetes' own, under its names: where pods run and how they are exposed."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from controller.spec.base import CLUSTER_ONLY, SpecModel

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


class Service(SpecModel):
    """The Service in front of the routers' data port."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Kind of Service."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations, for a cloud's load balancer say."""


class Placement(SpecModel):
    """Where pods may run and what they get there."""

    resources: Annotated[Resources, CLUSTER_ONLY] = Resources()
    """Resources of each pod's container."""
    node_selector: Annotated[dict[str, str], CLUSTER_ONLY] = Field(default_factory=dict)
    """Labels a node must have."""
    tolerations: Annotated[list[Toleration], CLUSTER_ONLY] = Field(default_factory=list)
    """Taints that are accepted."""
    affinity: Annotated[dict[str, Any], CLUSTER_ONLY] = Field(default_factory=dict)
    """Kubernetes affinity, passed on as it is."""
    topology_spread_constraints: Annotated[list[dict[str, Any]], CLUSTER_ONLY] = Field(default_factory=list)
    """Kubernetes topology spread constraints, passed on as they are."""
    pod_metadata: Annotated[PodMetadata, CLUSTER_ONLY] = PodMetadata()
    """Labels and annotations added to each pod."""
