"""The part of the manifest about a gateway that asks the routers where a request goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from controller.api.common import RawObject, SpecModel, rule_broken


class PoolReference(SpecModel):
    """An InferencePool that somebody else owns."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
    """Its name, in the KVCluster's namespace."""


class Gateway(SpecModel):
    """Gateways that send requests to the workers themselves, and ask the routers which one: see `docs/gateway.md`."""

    inference_pool: bool = False
    """Make an InferencePool of the workers, with the routers as its endpoint picker. The routers' own Service stays."""
    inference_pool_ref: PoolReference | None = None
    """For engine type `external`: an InferencePool that somebody else owns, whose pods are the workers. It is read and
    never changed; its `endpointPickerRef` has to name the Service `<name>-router-picker`, port 9002."""
    failure_mode: Literal["FailClose", "FailOpen"] = "FailClose"
    """What the gateway does while no router answers: refuse requests, or send them to any worker."""
    parent_refs: Annotated[list[RawObject], Field(max_length=32)] = Field(default_factory=list)
    """Gateways (or listeners) that an HTTPRoute to the pool is made for, as an HTTPRoute writes them: `{name,
    namespace, sectionName}`. Default: none, the pool waits for a route of yours."""

    @property
    def picks(self) -> bool:
        """Whether gateways ask the routers where a request goes."""
        return self.inference_pool or self.inference_pool_ref is not None

    @model_validator(mode="after")
    def _one_pool(self) -> Gateway:
        if self.inference_pool and self.inference_pool_ref is not None:
            raise rule_broken("inferencePoolRef", "cannot be used beside inferencePool: remove one of the two")
        return self

    @model_validator(mode="after")
    def _routes_lead_to_a_pool(self) -> Gateway:
        if self.parent_refs and not self.picks:
            raise rule_broken("parentRefs", "a route needs a pool to lead to: set inferencePool to true")
        return self
