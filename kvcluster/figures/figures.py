"""The figures of a period, computed from the metrics of one or more routers, and of the engines behind them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvcluster.figures.exposition import Exposition, Histogram, Labels, added, sum_of
from kvcluster.figures.scrape import ROUTER

ENGINE = "vllm:"
SECONDS = "_seconds"
PARTS = frozenset({"phase"})
"""Labels of series that are parts of the same requests: together they are no distribution of anything."""
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram says: mean and quantiles, in its unit. None: there were no observations."""

    name: str
    """The metric's, without its prefix and, for times, without `_seconds`."""
    labels: Mapping[str, str]
    """Empty: all series of the metric together."""
    count: int
    mean: float | None
    p50: float | None
    """Interpolated within the histogram's buckets, like the others."""
    p95: float | None
    p99: float | None
    limit: float | None
    """The last finite bound: a quantile of this value may in truth be larger."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many requests matched so many blocks."""

    above: int | None
    """Blocks, exclusive; None: no lower bound."""
    up_to: int | None
    """Blocks, inclusive; None: no upper bound."""
    requests: int


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker, as all routers together see it. Counts are those of the period, levels those of now."""

    worker: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    hit_rate: float | None
    in_flight: int
    """Requests of these routers that are with it."""
    running: int | None
    """Requests that its engine runs, by its own last report; None: it has reported nothing."""
    waiting: int | None
    blocks: int
    """Blocks that it holds, as the routers see it."""
    view_age_seconds: float | None


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """One worker, by its own metrics, over all routers and other clients. Tokens and seconds."""

    worker: str
    """What it calls itself."""
    url: str
    requests: int
    """Requests finished."""
    prompt_tokens: int
    """Looked up in its cache."""
    cached_tokens: int
    """Found there."""
    hit_rate: float | None
    generated_tokens: int
    preemptions: int
    latencies: tuple[Distribution, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of one period."""

    requests: Mapping[str, int]
    """Requests answered, by status."""
    decisions: Mapping[str, int]
    """Choices of a worker, by reason."""
    prompt_tokens: int
    """Of the answers that report cached tokens."""
    cached_tokens: int
    predicted_cached_tokens: int
    """What the decisions predicted for the same answers."""
    mispredicted_cached_tokens: Mapping[str, int]
    """By how much, each answer by itself: `over`, predicted and not cached; `under`, cached and not predicted."""
    hit_rate: float | None
    """cached_tokens / prompt_tokens."""
    latencies: tuple[Distribution, ...]
    """Of every histogram of seconds."""
    ttft_actual_to_predicted: Distribution | None
    """The time to first token of each stream, divided by what was predicted for it."""
    matched_blocks: Distribution | None
    match_lengths: tuple[Bucket, ...]
    """Requests by how many leading blocks of their prompt the chosen worker held."""
    workers: tuple[WorkerFigures, ...]
    engines: tuple[EngineFigures, ...] = field(default=())


def figures(
    routers: Iterable[Exposition],
    engines: Mapping[str, Exposition] | None = None,
    names: Mapping[str, str] | None = None,
) -> Figures:
    """The figures of these routers together; `engines`: metrics of workers by URL, `names`: what they call themselves.

    Raises `ExpositionError` if the routers' histograms have different buckets.
    """
    together = added(routers, _gauge)
    matched = together.histograms.get(ROUTER + _HISTOGRAMS["matched_blocks"], {})
    prompt, cached = _count(together, "reported_prompt_tokens_total"), _count(together, "actual_cached_tokens_total")
    return Figures(
        requests=_by(together, "requests_total", "code"),
        decisions=_by(together, "decisions_total", "reason"),
        prompt_tokens=prompt,
        cached_tokens=cached,
        predicted_cached_tokens=_count(together, "predicted_cached_tokens_total"),
        mispredicted_cached_tokens=_by(together, "mispredicted_cached_tokens_total", "direction"),
        hit_rate=cached / prompt if prompt else None,
        latencies=_latencies(together, ROUTER),
        ttft_actual_to_predicted=_only("ttft_actual_to_predicted", together),
        matched_blocks=_only("matched_blocks", together),
        match_lengths=tuple(
            Bucket(_whole(above), _whole(up_to), round(count))
            for histogram in matched.values()
            for above, up_to, count in histogram.buckets()
        ),
        workers=_workers(together),
        engines=tuple(
            sorted(
                (_engine((names or {}).get(url, url), url, engine) for url, engine in (engines or {}).items()),
                key=lambda engine: (engine.worker, engine.url),
            )
        ),
    )


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def _gauge(name: str) -> Callable[[float, float], float]:
    """Routers share out the requests; all else is the same worker or list seen by each."""
    return operator.add if name == f"{ROUTER}in_flight" else max


def _count(exposition: Exposition, name: str, prefix: str = ROUTER) -> int:
    return round(sum(exposition.counters.get(prefix + name, {}).values()))


def _by(exposition: Exposition, name: str, label: str) -> dict[str, int]:
    """The counts of a metric by the value of one label, added over the others; those that are not 0."""
    found: dict[str, int] = {}
    for labels, value in sorted(exposition.counters.get(ROUTER + name, {}).items()):
        if value:
            key = dict(labels).get(label, "")
            found[key] = found.get(key, 0) + round(value)
    return found


def _distribution(name: str, labels: Labels, histogram: Histogram) -> Distribution:
    quantiles = {name: histogram.quantile(share) for name, share in SHARES.items()}
    limit = histogram.bounds[-2] if len(histogram.bounds) > 1 else None
    return Distribution(name, dict(labels), round(histogram.count), histogram.mean, limit=limit, **quantiles)


_HISTOGRAMS = {
    "matched_blocks": "matched_blocks",
    "ttft_actual_to_predicted": "ttft_actual_to_predicted_ratio",
}


def _only(name: str, exposition: Exposition) -> Distribution | None:
    """That of a histogram without labels; None: the routers do not have it."""
    series = exposition.histograms.get(ROUTER + _HISTOGRAMS[name])
    return _distribution(name, (), sum_of(list(series.values()))) if series else None


def _latencies(exposition: Exposition, prefix: str, ignored: frozenset[str] = frozenset()) -> tuple[Distribution, ...]:
    """Of every histogram of seconds: all of its series together first, then each, where labels tell them apart."""
    found: list[Distribution] = []
    for name, series in sorted(exposition.histograms.items()):
        if not name.startswith(prefix) or not name.endswith(SECONDS):
            continue
        short = name.removeprefix(prefix).removesuffix(SECONDS)
        if not PARTS & {label for labels in series for label, _ in labels}:
            found.append(_distribution(short, (), sum_of(list(series.values()))))
        groups: dict[Labels, list[Histogram]] = {}
        for labels, histogram in series.items():
            groups.setdefault(tuple(pair for pair in labels if pair[0] not in ignored), []).append(histogram)
        if len(groups) > 1:
            found += [_distribution(short, labels, sum_of(group)) for labels, group in sorted(groups.items())]
    return tuple(found)


def _workers(exposition: Exposition) -> tuple[WorkerFigures, ...]:
    def of(samples: Mapping[Labels, float]) -> dict[str, float]:
        return {dict(labels).get("worker", ""): value for labels, value in samples.items()}

    counts = {name: of(exposition.counters.get(f"{ROUTER}worker_{name}_total", {})) for name in _COUNTS}
    levels = {name: of(exposition.gauges.get(ROUTER + name, {})) for name in _LEVELS}
    names = sorted({name for samples in (*counts.values(), *levels.values()) for name in samples})
    found = []
    for name in names:
        requests, prompt, cached = (round(counts[each].get(name, 0)) for each in _COUNTS)
        found.append(
            WorkerFigures(
                worker=name,
                requests=requests,
                prompt_tokens=prompt,
                cached_tokens=cached,
                hit_rate=cached / prompt if prompt else None,
                in_flight=round(levels["in_flight"].get(name, 0)),
                running=_whole(levels["worker_running"].get(name)),
                waiting=_whole(levels["worker_waiting"].get(name)),
                blocks=round(levels["worker_blocks"].get(name, 0)),
                view_age_seconds=levels["view_age_seconds"].get(name),
            )
        )
    return tuple(found)


_COUNTS = ("requests", "prompt_tokens", "cached_tokens")
_LEVELS = ("in_flight", "worker_running", "worker_waiting", "worker_blocks", "view_age_seconds")
_ENGINE_LABELS = frozenset({"engine", "model_name"})


def _engine(worker: str, url: str, exposition: Exposition) -> EngineFigures:
    def count(name: str) -> int:
        return _count(exposition, name, ENGINE)

    prompt, cached = count("prefix_cache_queries_total"), count("prefix_cache_hits_total")
    return EngineFigures(
        worker=worker,
        url=url,
        requests=count("request_success_total"),
        prompt_tokens=prompt,
        cached_tokens=cached,
        hit_rate=cached / prompt if prompt else None,
        generated_tokens=count("generation_tokens_total"),
        preemptions=count("num_preemptions_total"),
        latencies=_latencies(exposition, ENGINE, _ENGINE_LABELS),
    )
