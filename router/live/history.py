"""The last minutes of one router in steps of equal length, taken from counters that only grow.

Steps begin at whole multiples of their length in Unix time, so that those of several routers can be added up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, NamedTuple

from pydantic import Field

from router.live.document import Count, History, Number

STEP_SECONDS = 5.0
STEPS = 180
"""Steps that are kept: 15 minutes."""


class Reading(NamedTuple):
    """The counters at one moment, and how evenly the workers are loaded then."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds_saved: float
    ttft: tuple[int, ...]
    """Observations in each bucket."""
    tpot: tuple[int, ...]
    most_requests: int
    """Requests on the ready worker that has most."""
    mean_requests: float
    """Over the ready workers; 0 without any."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happened in one step, at one router or several."""

    number: Count
    """Unix time of its end, in steps."""
    seconds: Annotated[Number, Field(gt=0)]
    """That were measured: a router that was held up takes its readings late."""
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    prefill_seconds_saved: Number
    ttft: tuple[Count, ...]
    tpot: tuple[Count, ...]
    most_requests: Number
    """Summed over the routers, as is the mean: their ratio is the mean of the skews that the routers saw, weighted by
    the load."""
    mean_requests: Number

    def __add__(self, other: Step) -> Step:
        """Both routers' counts in the same step."""
        return Step(
            self.number,
            max(self.seconds, other.seconds),
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.prefill_seconds_saved + other.prefill_seconds_saved,
            _added(self.ttft, other.ttft),
            _added(self.tpot, other.tpot),
            self.most_requests + other.most_requests,
            self.mean_requests + other.mean_requests,
        )


def _added(one: Sequence[int], two: Sequence[int]) -> tuple[int, ...]:
    short, long = sorted((one, two), key=len)
    return (*(a + b for a, b in zip(short, long, strict=False)), *long[len(short) :])


class Recorder:
    """Turns readings into steps and keeps the latest `STEPS` of them. Memory: 0.5 KB a step."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=STEPS)
        self._last: tuple[float, Reading] | None = None

    def take(self, reading: Reading, at: float) -> None:
        """The counters at Unix time `at`. Readings belong shortly after the end of each step; one that comes while its
        step is already there (the clock was set back) is ignored, unless the clock was set back by more than a step:
        then what was recorded is dropped."""
        number, last = int(at // STEP_SECONDS), self._last
        if last is None or number < int(last[0] // STEP_SECONDS) - 1:
            self._steps.clear()
            self._last = at, reading
            return
        since, before = last
        if number <= int(since // STEP_SECONDS):
            return
        self._last = at, reading
        self._steps.append(
            Step(
                number,
                at - since,
                reading.requests - before.requests,
                reading.prompt_tokens - before.prompt_tokens,
                reading.cached_tokens - before.cached_tokens,
                reading.prefill_seconds_saved - before.prefill_seconds_saved,
                tuple(now - then for now, then in zip(reading.ttft, before.ttft, strict=True)),
                tuple(now - then for now, then in zip(reading.tpot, before.tpot, strict=True)),
                reading.most_requests,
                reading.mean_requests,
            )
        )

    def steps(self, after: int = 0) -> tuple[Step, ...]:
        """Those with a number above `after`, oldest first."""
        return tuple(step for step in self._steps if step.number > after)


def series(steps: Sequence[Step], ttft_bounds: Sequence[float], tpot_bounds: Sequence[float]) -> History:
    """The figures of these steps, of ascending numbers, without gaps from the first to the last; at most the latest
    `STEPS` of them."""
    if not steps:
        return History(STEP_SECONDS)
    known = {step.number: step for step in steps}
    last = steps[-1].number
    numbers = range(max(steps[0].number, last - STEPS + 1), last + 1)
    rows = [_figures(known.get(number), ttft_bounds, tpot_bounds) for number in numbers]
    return History(STEP_SECONDS, tuple(int(number * STEP_SECONDS) for number in numbers), *zip(*rows, strict=True))


def _figures(step: Step | None, ttft_bounds: Sequence[float], tpot_bounds: Sequence[float]) -> tuple[float | None, ...]:
    if step is None:
        return (None,) * 8
    return (
        _rounded(step.requests / step.seconds),
        _rounded(step.cached_tokens / step.prompt_tokens) if step.prompt_tokens else None,
        quantile(0.5, ttft_bounds, step.ttft),
        quantile(0.95, ttft_bounds, step.ttft),
        quantile(0.5, tpot_bounds, step.tpot),
        quantile(0.95, tpot_bounds, step.tpot),
        _rounded(step.most_requests / step.mean_requests) if step.mean_requests else None,
        _rounded(step.prefill_seconds_saved),
    )


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The value below which `share` (0..1) of the observations lie, interpolated within its bucket as Prometheus's
    `histogram_quantile` does; of the last, open bucket it is the lower bound. None without observations.

    `counts`: one more than `bounds`, which are upper bounds, ascending and positive.
    """
    below = list(accumulate(counts))
    if not below or not below[-1]:
        return None
    rank = share * below[-1]
    bucket = bisect_left(below, rank)
    if bucket >= len(bounds):
        return bounds[-1]
    low = bounds[bucket - 1] if bucket else 0.0
    before = below[bucket - 1] if bucket else 0
    return _rounded(low + (bounds[bucket] - low) * (rank - before) / counts[bucket])


def _rounded(value: float) -> float:
    return round(value, 6)
