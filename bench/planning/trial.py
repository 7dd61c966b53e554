"""One simulated cluster, measured against the bounds of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.numbers import milliseconds, seconds
from bench.record import Record
from bench.report import TOLERATED_ERRORS
from bench.result import summary
from bench.simulation.errors import NO_ROOM, PROMPT_TOO_LONG


@dataclass(frozen=True, slots=True)
class Target:
    """The bounds that 95 % of the requests have to meet, in seconds; None: any time will do."""

    ttft_p95: float | None = None
    tpot_p95: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.ttft_p95, self.tpot_p95) if bound is not None]
        if not bounds:
            raise ValueError("a plan needs a bound: give --ttft-p95, --tpot-p95 or both")
        if min(bounds) <= 0:
            raise ValueError("the bounds --ttft-p95 and --tpot-p95 must be above 0")

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_p95, seconds), ("TPOT", self.tpot_p95, milliseconds))
        return ", ".join(f"{name} p95 <= {shown(bound)}" for name, bound, shown in named if bound is not None)


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulated cluster. Times in seconds; None without an answer."""

    workers: int
    rate: float
    """Requests that came a second."""
    ttft_p95: float | None
    tpot_p95: float | None
    late_ttft_p95: float | None
    """That of the second half of the requests: far larger than `ttft_p95` if a queue grows and grows."""
    hit_rate: float | None
    failed: int
    """Requests without an answer, but for those that no worker takes."""
    requests: int
    in_flight: float
    """Requests that one worker has at a time, on average."""
    prompt_tokens: int
    output_tokens: int
    duration: float
    """From the first arrival to the last answer."""

    @property
    def slowest_ttft_p95(self) -> float | None:
        """The larger one of the two."""
        return None if self.ttft_p95 is None else max(self.ttft_p95, self.late_ttft_p95 or 0.0)

    def met(self, target: Target) -> bool:
        """Whether the cluster meets the target, also in the second half of the run."""
        if self.failed > TOLERATED_ERRORS * self.requests:
            return False
        bounds = ((target.ttft_p95, self.slowest_ttft_p95), (target.tpot_p95, self.tpot_p95))
        return all(bound is None or (time is not None and time <= bound) for bound, time in bounds)

    def worker_hours_per_million(self) -> float | None:
        """Hours of one worker for a million tokens, of prompts and answers together."""
        tokens = self.prompt_tokens + self.output_tokens
        return self.workers * self.duration / 3600 / tokens * 1e6 if tokens else None

    def dollars_per_million(self, price: float | None) -> float | None:
        """The cost of a million tokens at a price of a worker-hour."""
        hours = self.worker_hours_per_million()
        return None if price is None or hours is None else hours * price


def trial_of(records: Sequence[Record], workers: int) -> Trial:
    """The figures of a run on so many workers. Requests that no worker takes are left out."""
    taken = [record for record in records if not _refused(record)]
    answered = [record for record in taken if record.error is None]
    ttft = summary(record.ttft for record in answered if record.ttft is not None)
    tpot = summary(record.tpot for record in answered if record.tpot is not None)
    late = summary(record.ttft for record in answered[len(answered) // 2 :] if record.ttft is not None)
    begin = min((record.sent for record in taken), default=0.0)
    last = max((record.sent for record in taken), default=0.0)
    duration = max((record.finished for record in answered if record.finished is not None), default=begin) - begin
    told = [record for record in answered if record.cached_tokens is not None]
    prompt_tokens = sum(record.prompt_tokens or 0 for record in answered)
    return Trial(
        workers=workers,
        rate=(len(taken) - 1) / (last - begin) if last > begin else 0.0,
        ttft_p95=ttft.p95 if ttft else None,
        tpot_p95=tpot.p95 if tpot else None,
        late_ttft_p95=late.p95 if late else None,
        hit_rate=sum(record.cached_tokens or 0 for record in told) / prompt_tokens if prompt_tokens else None,
        failed=len(taken) - len(answered),
        requests=len(taken),
        in_flight=sum(record.latency or 0.0 for record in answered) / duration / workers if duration else 0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=sum(record.output_tokens or 0 for record in answered),
        duration=duration,
    )


def _refused(record: Record) -> bool:
    """Whether no worker takes the request: it is too long."""
    return record.error in (PROMPT_TOO_LONG.cause, NO_ROOM.cause)
