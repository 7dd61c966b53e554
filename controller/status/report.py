"""What a router reports about itself at `GET /status` on its management port."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    AliasPath,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

_CONFIG = ConfigDict(strict=True, populate_by_name=True)


class ReportError(ValueError):
    """A router gave no report; the message says why, or which field of it is wrong and how."""


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
"""A count; one that a router keeps as a float (a Prometheus counter is one) counts too."""
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class RecentDecision:
    """One of a router's latest decisions."""

    age_seconds: Quantity
    worker_id: str
    reason: str
    matched_blocks: Count = 0
    prompt_blocks: Count | None = None
    """None where the prompt was not tokenised."""
    predicted_ttft_seconds: Quantity | None = None


@dataclass(frozen=True, slots=True, config=_CONFIG)
class DiscoveryReport:
    """Where the router's list of workers comes from, and whether it is kept up to date."""

    source: str = ""
    """`kubernetes`, `inference-pool`, `static` or `file`."""
    healthy: bool = True
    age_seconds: Quantity | None = None
    """Since the list was last known to be right."""
    error: str = ""


@dataclass(frozen=True, slots=True, config=_CONFIG)
class TokenizerReport:
    """Whether the router has its tokenizer. Without it, it routes by load."""

    state: str = ""
    """`loading`, `loaded` or `failed`; empty from a router that does not say."""
    error: str = ""


@dataclass(frozen=True, slots=True, config=_CONFIG)
class ModelReport:
    """One model that the router's workers serve."""

    name: str
    ready: Count = 0
    """Workers of it that may get requests."""
    adapters: Mapping[str, Count] = field(default_factory=dict)
    """By LoRA adapter: those of them that have it loaded."""
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By adapter and worker id: why it is not loaded there although it should be; empty: it is about to be."""


@dataclass(frozen=True, slots=True, config=_CONFIG)
class RouterReport:
    """A router's report at the moment when it was asked. Counts are since its start.

    The fields without a default must be there. Fields that a newer router adds are ignored.
    """

    strategy: str
    workers_known: Annotated[Count, Field(validation_alias=AliasPath("workers", "known"))]
    workers_ready: Annotated[Count, Field(validation_alias=AliasPath("workers", "ready"))]
    workers_matching: Annotated[Count, Field(validation_alias=AliasPath("workers", "matching"))]
    """Workers against whose caches prompts are matched."""
    workers_history: Annotated[Count, Field(validation_alias="history_workers")] = 0
    """Workers without a cache feed, for which it goes by what it has sent them."""
    draining: bool = False
    view_age_seconds: Quantity | None = None
    """Age of the oldest view among ready workers; None without a view."""
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    """Those of the prompt tokens that came from a worker's cache, by the words of the workers; at most all of them."""
    decisions: Mapping[str, Count] = field(default_factory=dict)
    """Count of decisions by reason."""
    recent: Annotated[tuple[RecentDecision, ...], Field(strict=False)] = ()
    """The latest decisions, newest first."""
    discovery: DiscoveryReport = field(default_factory=DiscoveryReport)
    tokenizer: TokenizerReport = field(default_factory=TokenizerReport)
    models: Annotated[tuple[ModelReport, ...], Field(strict=False)] = ()
    """The models that its workers serve."""
    reuse_score: Mapping[str, Quantity] = field(default_factory=dict)
    """By worker id, which for a data-parallel rank is `pod/rank`: blocks reused there, decayed."""

    @field_validator("cached_tokens")
    @classmethod
    def _of_the_prompt_tokens(cls, cached: int, fields: ValidationInfo) -> int:
        prompt: int = fields.data.get("prompt_tokens", 0)
        return min(cached, prompt)


_REPORT = TypeAdapter(RouterReport)


def parse_report(body: bytes) -> RouterReport:
    """The report in the body of an answer. Raises `ReportError`."""
    try:
        return _REPORT.validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ReportError("; ".join(f"{_place(each['loc'])}{each['msg']}" for each in problems)) from None


def _place(location: tuple[int | str, ...]) -> str:
    return f"{'.'.join(map(str, location))}: " if location else ""
