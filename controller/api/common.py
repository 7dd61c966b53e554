"""What parts of the manifest share: the base model, and types of Kubernetes' own (placement, resources, variables)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError

from controller.api import flags


class _ClusterOnly:
    """Marks a field that only Kubernetes can honour, in its metadata and in its JSON schema."""

    KEYWORD = "x-cluster-only"

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), self.KEYWORD: True}


CLUSTER_ONLY = _ClusterOnly()


class SpecModel(BaseModel):
    """What every part of a manifest has in common."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
    )


def rule_broken(path: str, message: str) -> PydanticCustomError:
    """A rule across fields is broken; `path` names the field to change, relative to the model that checks."""
    return PydanticCustomError("rule", "{message}", {"message": message, "path": path})


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
    tolerations: Annotated[list[Toleration], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Taints that are accepted."""
    affinity: Annotated[RawObject, CLUSTER_ONLY] = Field(default_factory=dict)
    """Kubernetes affinity, passed on as it is."""
    topology_spread_constraints: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Kubernetes topology spread constraints, passed on as they are. Default: spread over nodes where possible."""
    priority_class_name: Annotated[Annotated[str, Field(max_length=253)] | None, CLUSTER_ONLY] = None
    """PriorityClass of the pods."""
    pod_metadata: Annotated[PodMetadata, CLUSTER_ONLY] = PodMetadata()
    """Labels and annotations added to each pod."""


class EnvVar(SpecModel):
    """An environment variable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=32_768)] = ""
    """Its value: a string (quote numbers and true/false)."""
    value_from: Annotated[RawObject | None, CLUSTER_ONLY] = None
    """Where the value comes from instead: Kubernetes' `secretKeyRef`, `configMapKeyRef`, `fieldRef`."""

    @model_validator(mode="after")
    def _not_a_flag(self) -> EnvVar:
        if (wrong := flags.variable_problem(self.name)) is not None:
            raise rule_broken("name", wrong)
        return self

    @model_validator(mode="after")
    def _one_source(self) -> EnvVar:
        if self.value and self.value_from is not None:
            raise rule_broken("valueFrom", "cannot be used beside value: remove one of the two")
        return self


def check_unique_names(env: Iterable[EnvVar]) -> None:
    """Raises a broken rule for a variable that is given twice."""
    if (index := first_repeated(variable.name for variable in env)) is not None:
        raise rule_broken(f"env[{index}].name", "is given twice: remove one of the two")


def first_repeated(values: Iterable[str]) -> int | None:
    """Index of the first value that was given before; None when all differ."""
    seen: set[str] = set()
    for index, value in enumerate(values):
        if value in seen:
            return index
        seen.add(value)
    return None
