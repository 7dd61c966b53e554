"""The part of the manifest that says how the number of workers follows their load."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from controller.api.common import SpecModel, rule_broken


class Scaler(StrEnum):
    """What changes the number of workers."""

    HPA = "hpa"
    KEDA = "keda"


class Autoscaling(SpecModel):
    """The number of workers follows their queues."""

    type: Annotated[Scaler, Field(strict=False)] = Scaler.HPA
    """`hpa` (needs a custom metrics adapter that serves vllm:num_requests_waiting for pods) or `keda`."""
    min: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Fewest workers. 0 (type `keda` alone): none runs while nobody asks; routers hold requests until one starts."""
    max: Annotated[int, Field(ge=1, le=10_000)]
    """Most workers."""
    target_queue: Annotated[int, Field(ge=1, le=100_000)] = 4
    """Waiting requests per worker to aim at: more, and workers are added."""
    scale_down_seconds: Annotated[int, Field(ge=0, le=3_600)] = 300
    """How long the queues must have been short before a worker is taken away: its cache goes with it."""
    start_seconds: Annotated[int, Field(ge=1, le=3_600)] | None = None
    """With `min: 0`: how long a worker takes to start at most, its model's loading included. Requests are held for as
    long, and no worker is taken away sooner after the last request. Default: 900 for `vllm`, 30 for the emulator."""
    prometheus_address: Annotated[str, Field(pattern=r"^https?://.+$", max_length=2_048)] | None = None
    """For `keda`: where Prometheus is asked, such as http://prometheus.monitoring:9090."""

    @model_validator(mode="after")
    def _bounds(self) -> Autoscaling:
        if self.min > self.max:
            raise rule_broken("min", f"must not exceed max ({self.max}): lower min or raise max")
        return self

    @model_validator(mode="after")
    def _keda_scales_to_zero(self) -> Autoscaling:
        if self.min == 0 and self.type is not Scaler.KEDA:
            raise rule_broken("min", "0 needs type keda: set it, or min to 1")
        return self

    @model_validator(mode="after")
    def _keda_asks_prometheus(self) -> Autoscaling:
        if self.type is Scaler.KEDA and self.prometheus_address is None:
            raise rule_broken("prometheusAddress", "type keda needs the address of the Prometheus to ask")
        return self
