"""The part of the manifest that says which requests wait in the routers, and who goes next."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from controller.api.common import SpecModel, first_repeated, rule_broken

Priority = Annotated[int, Field(ge=-999_999_999, le=999_999_999)]
Mebibytes = Annotated[int, Field(ge=1, le=999_999)]
MAX_CLASSES = 16
"""Each has series of its own in the routers' metrics."""


class FlowClass(SpecModel):
    """Requests of similar urgency."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$", max_length=31)]
    """Name of the class, in metrics and on the live page."""
    priority: Priority
    """A request belongs to the class with the largest priority that does not exceed its own, or to the lowest."""
    ttl_seconds: Annotated[float, Field(ge=0.001, le=86_400, allow_inf_nan=False)] = 30.0
    """Seconds that its requests wait at most for room on a worker; then they are answered with 429."""
    max_mib: Mebibytes = 128
    """MiB that its waiting requests take at most; what does not fit is answered with 429."""


class Objective(SpecModel):
    """What a request may name instead of stating a priority."""

    name: Annotated[str, Field(pattern=r"^[^\s,=]+$", max_length=253)]
    """What the header `x-llm-d-inference-objective` says."""
    priority: Priority
    """The priority of these requests."""


class FlowControl(SpecModel):
    """Which requests wait in a router while all workers are busy, and who goes next: see `docs/flow-control.md`."""

    enabled: bool = False
    """Whether requests wait in the routers, by class and then fairly among tenants, instead of in the engines."""
    classes: Annotated[list[FlowClass], Field(max_length=MAX_CLASSES)] = Field(default_factory=list)
    """Classes of requests by priority. Default: high (1), standard (0) and sheddable (-1)."""
    objectives: Annotated[list[Objective], Field(max_length=64)] = Field(default_factory=list)
    """Priorities of the objectives that requests may name."""
    tenant_header: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=64)] | None = None
    """The one header that names a request's tenant, in lower case. Default: `x-llm-d-inference-fairness-id` and its
    older name. The tenant of an API key prevails."""
    max_mib: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """MiB that all waiting requests of a router take at most (`--flow-max-bytes`)."""
    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most requests that wait in a router (`--flow-max-requests`)."""
    queue_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    """A worker is busy when a new request would wait there for more seconds than these (`--flow-queue-limit`)."""
    overtaken_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | None = None
    """Seconds after it was first overtaken by which a request takes any worker with room (`--flow-overtaken`)."""
    quantum_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Tokens that each tenant may have computed in one round (`--flow-quantum`)."""

    @model_validator(mode="after")
    def _classes_differ(self) -> FlowControl:
        for name in ("name", "priority"):
            if (index := first_repeated(str(getattr(each, name)) for each in self.classes)) is not None:
                raise rule_broken(f"classes[{index}].{name}", "is that of another class: change one of the two")
        if (index := first_repeated(each.name for each in self.objectives)) is not None:
            raise rule_broken(f"objectives[{index}].name", "is given twice: remove one of the two")
        return self
