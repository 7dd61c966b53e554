"""Counters and histograms of what happens to each request: plain numbers, turned into Prometheus's form at a scrape.

The client library's own classes take a lock and look labels up at each event (1 to 2 µs, a dozen times a request).
These belong to one thread, that of the event loop, in which the scrape runs too. What happens rarely is counted by the
library's.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as LibraryCounter
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Counter(Collector):
    """A counter: add to `value`."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self.value: float = 0
        self.label_names: tuple[str, ...] = ()
        self._name, self._text = name, text
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return (CounterMetricFamily(self._name, self._text),)

    def collect(self) -> Iterable[Metric]:
        return (CounterMetricFamily(self._name, self._text, value=self.value),)


class LabelledCounter(Collector):
    """Counters by the values of their labels: add to `counts[values]`, a tuple. The values must be bounded."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self.counts: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.label_names = tuple(labels)
        self._name, self._text = name, text
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return (CounterMetricFamily(self._name, self._text, labels=self.label_names),)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self.label_names)
        for values, count in self.counts.items():
            family.add_metric(values, count)
        return (family,)


class Buckets:
    """How many observations fell between two bounds, and their sum. O(log bounds) an observation."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        """Upper bounds, inclusive, ascending; above the last one there is one more bucket."""
        self.counts = [0] * (len(self.bounds) + 1)
        """Observations in each bucket (not those below it, as Prometheus counts them)."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)


class Histogram(Buckets, Collector):
    """A histogram without labels."""

    __slots__ = ("_name", "_text", "label_names")

    def __init__(self, name: str, text: str, bounds: Iterable[float], registry: CollectorRegistry) -> None:
        super().__init__(bounds)
        self.label_names: tuple[str, ...] = ()
        self._name, self._text = name, text
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return (HistogramMetricFamily(self._name, self._text),)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text)
        _add(family, (), self)
        return (family,)


class LabelledHistogram(Collector):
    """A histogram for each of the given values of its one label: `histogram[value].observe(...)`."""

    def __init__(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        label: str,
        values: Iterable[str],
        registry: CollectorRegistry,
    ) -> None:
        self.by_value: Mapping[str, Buckets] = {value: Buckets(bounds) for value in values}
        self.label_names = (label,)
        self._name, self._text = name, text
        registry.register(self)

    def __getitem__(self, value: str) -> Buckets:
        return self.by_value[value]

    def describe(self) -> Iterable[Metric]:
        return (HistogramMetricFamily(self._name, self._text, labels=self.label_names),)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self.label_names)
        for value, buckets in self.by_value.items():
            _add(family, (str(value),), buckets)
        return (family,)


def _add(family: HistogramMetricFamily, labels: Sequence[str], buckets: Buckets) -> None:
    below, cumulative = 0, []
    for bound, count in zip((*buckets.bounds, float("inf")), buckets.counts, strict=True):
        below += count
        cumulative.append((floatToGoString(bound), below))  # type: ignore[no-untyped-call]
    family.add_metric(labels, cumulative, buckets.sum)


def total(counter: Counter | LabelledCounter | LibraryCounter) -> float:
    """A counter's value, summed over all of its labels."""
    return sum(by_label(counter).values())


def by_label(counter: Counter | LabelledCounter | LibraryCounter) -> dict[str, float]:
    """A counter's values by the values of its labels, one after another (empty if it has no label)."""
    return {
        "".join(sample.labels.values()): sample.value
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
