"""The result of a run: the figures that its records give. It is written as JSON.

All times are emulated seconds, which are wall seconds times `--speed`, so that results at different speeds can be
compared.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from bench.record import HIT_SHARE, Record
from bench.slo import Goodput, Slo


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution, in seconds."""

    avg: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Split:
    """The requests of one kind, hits or misses."""

    requests: int
    ttft_seconds: Summary | None
    latency_seconds: Summary | None


@dataclass(frozen=True, slots=True)
class WorkerTally:
    """What one worker did."""

    requests: int = 0
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    """Prompt tokens that it had to compute, for the requests whose answers say how many were cached."""
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadgenHealth:
    """How well the load generator kept up. Wall seconds, whatever the speed."""

    lateness_seconds: Summary | None
    """Actual minus scheduled sending."""
    loop_lag_seconds: Summary | None
    """How much longer than asked a short sleep took. Any measured time may be too long by this much."""
    cpu_share: float
    """Of one core, over the run."""
    bottleneck: tuple[str, ...]
    """Why the figures are about the load generator rather than the cluster; empty: it kept up."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The requests at the beginning that are sent but not measured: caches fill and queues build up meanwhile."""

    requests: int = 0
    seconds: float = 0.0
    """By the time at which a request was due."""

    def __bool__(self) -> bool:
        return bool(self.requests or self.seconds)

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.seconds else f"{self.requests:,} requests"

    def over(self, index: int, at: float) -> bool:
        """Whether request number `index`, due at `at` seconds, is measured."""
        return index >= self.requests and at >= self.seconds

    def measured(self, records: Sequence[Record]) -> list[Record]:
        """The records that count."""
        return [r for r in records if self.over(r.index, r.scheduled)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What of a run is measured."""

    warm_up: WarmUp = WarmUp()
    slo: Slo = field(default_factory=Slo)


ALL = Measurement()
"""Every request, without an SLO."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one strategy. Where it had a warm-up, nothing here is about its requests."""

    strategy: str
    requests: int
    errors: int
    hit_rate: float | None
    """Cached prompt tokens, as the workers report them, over prompt tokens; None: they report none."""
    ttft_seconds: Summary | None
    latency_seconds: Summary | None
    tpot_seconds: Summary | None
    """Mean time between two tokens of each answer of two tokens or more."""
    hit: Split
    """Requests with at least `HIT_SHARE` of the prompt cached."""
    miss: Split
    match_blocks: Mapping[str, int]
    """Requests by the number of blocks matched, in ranges of powers of two."""
    workers: Mapping[str, WorkerTally]
    computed_tokens: int
    """Prompt tokens that all workers together had to compute, for the requests whose answers say what was cached."""
    prefill_skew: float | None
    """Largest over mean of the workers' uncached tokens; 1: the work is even."""
    running_skew: float | None
    """The most answers that one worker generates at a time over the mean of all workers, both averaged over time."""
    error_causes: Mapping[str, int]
    """Requests without a complete answer, by `ErrorCause`."""
    error_details: Mapping[str, int]
    """The same in words."""
    reasons: Mapping[str, int]
    duration_seconds: float
    """From the start, or the end of the warm-up, to the last answer."""
    requests_per_second: float
    """Answered requests over `duration_seconds`."""
    output_tokens_per_second: float
    goodput: Goodput | None
    """None: no SLO was given."""
    warm_up_requests: int
    """Sent before, and not measured."""
    ttft_percentiles: Sequence[float]
    """TTFT at 0 %, 1 %, ... 100 %; empty without answers."""
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    loadgen: LoadgenHealth | None = None
    """None for a simulation: nothing is late on a virtual clock."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known of a run besides its records."""

    strategy: str
    seed: int
    config: Mapping[str, Any]
    block_size: int = 16
    worker_ids: Sequence[str] = ()
    """All workers, so that one without requests counts for the mean."""
    loadgen: LoadgenHealth | None = None
    extra_versions: Mapping[str, str] = field(default_factory=dict)
    tallies: Mapping[str, WorkerTally] | None = None
    """What the workers counted themselves over the whole run, for a router whose answers do not name the worker."""


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of values in ascending order, interpolated between the two nearest."""
    at = (len(ordered) - 1) * q
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(values: Iterable[float]) -> Summary | None:
    """Mean and quantiles; None: there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(
        sum(ordered) / len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.95), quantile(ordered, 0.99)
    )


def block_range(blocks: int) -> str:
    """The range of powers of two that a number of blocks falls in: `0`, `1`, `2-3`, `4-7`, ..."""
    if blocks < 2:
        return str(blocks)
    low = 1 << (blocks.bit_length() - 1)
    return f"{low}-{2 * low - 1}"


def _own_version() -> str:
    try:
        return version("kvcluster")
    except PackageNotFoundError:
        return "source tree, not installed"


def versions(extra: Mapping[str, str]) -> dict[str, str]:
    """Versions of the software that the figures were made with."""
    return {
        "kvcluster": _own_version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        **extra,
    }


def _split(records: Sequence[Record]) -> Split:
    return Split(
        requests=len(records),
        ttft_seconds=summary(r.ttft for r in records if r.ttft is not None),
        latency_seconds=summary(r.latency for r in records if r.latency is not None),
    )


def _matched(record: Record, block_size: int) -> int | None:
    if record.matched_blocks is not None:
        return record.matched_blocks
    return None if record.cached_tokens is None else record.cached_tokens // block_size


def _histogram(records: Sequence[Record], block_size: int) -> dict[str, int]:
    counts = Counter(matched for r in records if (matched := _matched(r, block_size)) is not None)
    ranges: dict[str, int] = {}
    for blocks in sorted(counts):
        name = block_range(blocks)
        ranges[name] = ranges.get(name, 0) + counts[blocks]
    return ranges


def _tallies(records: Sequence[Record], worker_ids: Sequence[str]) -> dict[str, WorkerTally]:
    tallies = {worker: WorkerTally() for worker in worker_ids}
    for r in records:
        name = r.worker or "unnamed"
        before = tallies.get(name, WorkerTally())
        prompt = r.prompt_tokens or 0
        tallies[name] = WorkerTally(
            requests=before.requests + 1,
            prompt_tokens=before.prompt_tokens + prompt,
            uncached_tokens=before.uncached_tokens + (0 if r.cached_tokens is None else prompt - r.cached_tokens),
            output_tokens=before.output_tokens + (r.output_tokens or 0),
        )
    return dict(sorted(tallies.items()))


def running_skew(records: Iterable[Record], worker_ids: Sequence[str]) -> float | None:
    """The time integral of the largest number of answers that one worker generates over that of the mean of
    `worker_ids` and of any other worker named in a record.

    An answer is generated from its first token to its end. 1: at every moment each worker had equally many; as many as
    there are workers: one had all. None: nothing was generated.
    """
    running = dict.fromkeys(worker_ids, 0)
    changes: list[tuple[float, int, str]] = []
    for r in records:
        if r.first_token is not None and r.finished is not None:
            running.setdefault(r.worker or "unnamed", 0)
            changes += ((r.first_token, 1, r.worker or "unnamed"), (r.finished, -1, r.worker or "unnamed"))
    largest = total = before = 0.0
    for at, change, worker in sorted(changes):
        largest += (at - before) * max(running.values())
        total += (at - before) * sum(running.values())
        running[worker] += change
        before = at
    return largest * len(running) / total if total else None


def summarise(records: Sequence[Record], info: RunInfo, measurement: Measurement = ALL) -> Result:
    """The result of a run. The figures are about the requests that were answered in full; the others are counted by
    cause."""
    measured = measurement.warm_up.measured(records) if measurement.warm_up else records
    answered = [r for r in measured if r.error is None]
    told = [r for r in answered if r.hit is not None]
    prompt_tokens = sum(r.prompt_tokens or 0 for r in told)
    ttfts = sorted(r.ttft for r in answered if r.ttft is not None)
    named = info.tallies is None
    workers = _tallies(answered, info.worker_ids) if info.tallies is None else dict(info.tallies)
    computed = [tally.uncached_tokens for tally in workers.values()]
    overall = _split(answered)
    begins = min((r.scheduled for r in measured), default=0.0) if measurement.warm_up else 0.0
    lasts = max((r.finished for r in measured if r.finished is not None), default=begins) - begins
    output_tokens = sum(r.output_tokens or 0 for r in answered)
    return Result(
        strategy=info.strategy,
        requests=len(measured),
        errors=len(measured) - len(answered),
        hit_rate=sum(r.cached_tokens or 0 for r in told) / prompt_tokens if prompt_tokens else None,
        ttft_seconds=overall.ttft_seconds,
        latency_seconds=overall.latency_seconds,
        tpot_seconds=summary(r.tpot for r in answered if r.tpot is not None),
        hit=_split([r for r in told if r.hit]),
        miss=_split([r for r in told if not r.hit]),
        match_blocks=_histogram(answered, info.block_size),
        workers=workers,
        computed_tokens=sum((r.prompt_tokens or 0) - (r.cached_tokens or 0) for r in told),
        prefill_skew=max(computed) * len(computed) / sum(computed) if sum(computed) else None,
        running_skew=running_skew(answered, info.worker_ids) if named else None,
        error_causes=dict(Counter(r.error.value for r in measured if r.error is not None).most_common()),
        error_details=dict(Counter(r.detail for r in measured if r.detail).most_common()),
        reasons=dict(Counter(r.reason for r in answered if r.reason).most_common()),
        duration_seconds=lasts,
        requests_per_second=len(answered) / lasts if lasts > 0 else 0.0,
        output_tokens_per_second=output_tokens / lasts if lasts > 0 else 0.0,
        goodput=measurement.slo.goodput(measured) if measurement.slo else None,
        warm_up_requests=len(records) - len(measured),
        ttft_percentiles=[quantile(ttfts, percent / 100) for percent in range(101)] if ttfts else [],
        config={
            **info.config,
            "hit_share": HIT_SHARE,
            **({"warm_up": str(measurement.warm_up)} if measurement.warm_up else {}),
        },
        versions=versions(info.extra_versions),
        seed=info.seed,
        loadgen=info.loadgen,
    )


def write_json(file: Path, value: object) -> None:
    """Write dataclasses, mappings and lists as indented JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
