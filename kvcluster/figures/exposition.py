"""Metrics in Prometheus's text format, read, subtracted and added without losing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
"""(name, value), in the order of the names."""


class ExpositionError(RuntimeError):
    """A text is not in Prometheus's format, or two of them cannot be added."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A Prometheus histogram: for each upper bound, ascending to infinity, the observations up to it.

    `total` is the sum of the observations, in their unit.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> float:
        """Number of observations."""
        return self.counts[-1]

    @property
    def mean(self) -> float | None:
        """None without observations."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value that this share of the observations does not exceed; None without observations.

        The value is interpolated within its bucket as Prometheus's `histogram_quantile` does: observations count as
        spread evenly over the bucket, and those beyond the last finite bound count as that bound.
        """
        if not self.count:
            return None
        rank = share * self.count
        index = next(place for place, count in enumerate(self.counts) if count >= rank)
        high = self.bounds[index]
        if math.isinf(high):
            return self.bounds[-2] if len(self.bounds) > 1 else None
        low = self.bounds[index - 1] if index else min(high, 0.0)
        below = self.counts[index - 1] if index else 0.0
        within = self.counts[index] - below
        return high if not within else low + (high - low) * (rank - below) / within

    def buckets(self) -> list[tuple[float | None, float | None, float]]:
        """(above, up to, observations) of each bucket that has any; None: there is no such bound."""
        lows: tuple[float | None, ...] = (None, *self.bounds)
        below = (0.0, *self.counts)
        return [
            (low, None if math.isinf(high) else high, count - before)
            for low, high, count, before in zip(lows, self.bounds, self.counts, below, strict=False)
            if count > before
        ]


def sum_of(histograms: Sequence[Histogram]) -> Histogram:
    """The observations of all of them together (at least one). Raises `ExpositionError` if their buckets differ."""
    if len({each.bounds for each in histograms}) > 1:
        raise ExpositionError("histograms of one name have different buckets: they are of different versions")
    counts = tuple(map(sum, zip(*(each.counts for each in histograms), strict=True)))
    return Histogram(histograms[0].bounds, counts, math.fsum(each.total for each in histograms))


def _increase(now: Histogram, before: Histogram) -> Histogram:
    if now.bounds != before.bounds or any(a < b for a, b in zip(now.counts, before.counts, strict=True)):
        return now  # the process has restarted meanwhile
    counts = tuple(a - b for a, b in zip(now.counts, before.counts, strict=True))
    return Histogram(now.bounds, counts, now.total - before.total)


Counters = Mapping[str, Mapping[Labels, float]]
Histograms = Mapping[str, Mapping[Labels, Histogram]]


@dataclass(frozen=True, slots=True)
class Exposition:
    """The samples of a process, by metric name (counters with `_total`) and labels."""

    counters: Counters = field(default_factory=dict)
    gauges: Counters = field(default_factory=dict)
    histograms: Histograms = field(default_factory=dict)

    def since(self, before: Exposition) -> Exposition:
        """What has been counted since `before`. Of a process that has restarted meanwhile: since its start, as
        Prometheus's `increase` has it. Gauges are those of now."""
        counters = {
            name: {
                labels: value - old if (old := before.counters.get(name, {}).get(labels, 0.0)) <= value else value
                for labels, value in samples.items()
            }
            for name, samples in self.counters.items()
        }
        histograms = {
            name: {
                labels: _increase(value, earlier)
                if (earlier := before.histograms.get(name, {}).get(labels)) is not None
                else value
                for labels, value in samples.items()
            }
            for name, samples in self.histograms.items()
        }
        return Exposition(counters, self.gauges, histograms)


def added(expositions: Iterable[Exposition], gauges: Callable[[str], Callable[[float, float], float]]) -> Exposition:
    """The sum of several processes' samples. `gauges` says by name how two values of a gauge become one.

    Raises `ExpositionError` where histograms have different buckets.
    """
    counters: dict[str, dict[Labels, float]] = {}
    levels: dict[str, dict[Labels, float]] = {}
    histograms: dict[str, dict[Labels, Histogram]] = {}
    for each in expositions:
        for name, samples in each.counters.items():
            for labels, value in samples.items():
                known = counters.setdefault(name, {})
                known[labels] = known.get(labels, 0.0) + value
        for name, samples in each.gauges.items():
            for labels, value in samples.items():
                known = levels.setdefault(name, {})
                known[labels] = gauges(name)(known[labels], value) if labels in known else value
        for name, distributions in each.histograms.items():
            for labels, histogram in distributions.items():
                found = histograms.setdefault(name, {})
                found[labels] = sum_of((found[labels], histogram)) if labels in found else histogram
    return Exposition(counters, levels, histograms)


def parse(text: str) -> Exposition:
    """Raises `ExpositionError`."""
    counters: dict[str, dict[Labels, float]] = {}
    gauges: dict[str, dict[Labels, float]] = {}
    histograms: dict[str, dict[Labels, Histogram]] = {}
    try:
        for family in text_string_to_metric_families(text):
            if family.type == "histogram":
                histograms[family.name] = _histograms(family)
            elif family.type in ("counter", "gauge"):
                into = counters if family.type == "counter" else gauges
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        into.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise ExpositionError(f"no metrics in Prometheus's format: {error!r:.200}") from None
    return Exposition(counters, gauges, histograms)


def _histograms(family: Metric) -> dict[Labels, Histogram]:
    buckets: dict[Labels, dict[float, float]] = {}
    totals: dict[Labels, float] = {}
    for sample in family.samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets.setdefault(labels, {})[float(sample.labels["le"])] = sample.value
        elif sample.name.endswith("_sum"):
            totals[labels] = sample.value
    found = {}
    for labels, counts in buckets.items():
        bounds = tuple(sorted(counts))
        if not math.isinf(bounds[-1]):
            raise ValueError(f"{family.name} has no bucket +Inf")
        found[labels] = Histogram(bounds, tuple(counts[bound] for bound in bounds), totals.get(labels, 0.0))
    return found
