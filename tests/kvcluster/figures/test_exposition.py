"""Metrics in Prometheus's text format: read, interpolated, subtracted and added.

Covered: histograms of random observations against the observations themselves, restarts between two readings, and
texts that cannot be used. Not covered: which figures are made of them (test_metrics.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as Exposed

from kvcluster.figures.exposition import Exposition, ExpositionError, Histogram, added, parse, sum_of

BOUNDS = (0.01, 0.1, 0.5, 1.0, 10.0)
SERIES = (("cache", "hit"),)
seconds = st.lists(st.floats(0, 20, allow_nan=False), max_size=40)


def exposed(observations: list[float], count: float = 0, level: float = 0) -> Exposition:
    """As a process exposes them, in text."""
    registry = CollectorRegistry()
    histogram = Exposed("wait_seconds", "x", ["cache"], buckets=BOUNDS, registry=registry).labels("hit")
    for observation in observations:
        histogram.observe(observation)
    Counter("done", "x", registry=registry).inc(count)
    Gauge("level", "x", registry=registry).set(level)
    return parse(generate_latest(registry).decode())


def of(exposition: Exposition) -> Histogram:
    return exposition.histograms["wait_seconds"][SERIES]


@given(seconds, st.sampled_from([0.05, 0.5, 0.95, 0.99, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(observations: list[float], share: float) -> None:
    histogram = of(exposed(observations))
    found = histogram.quantile(share)
    if not observations:
        assert (found, histogram.mean) == (None, None)
        return
    assert histogram.mean == pytest.approx(math.fsum(observations) / len(observations))
    true = sorted(observations)[max(0, math.ceil(share * len(observations)) - 1)]
    assert found is not None
    if true > BOUNDS[-1]:
        assert found == BOUNDS[-1]
    else:
        place = bisect_left(BOUNDS, true)
        assert (BOUNDS[place - 1] if place else 0.0) <= found <= BOUNDS[place]


def test_quantiles_are_interpolated_as_prometheus_does() -> None:
    """4 in (0.1, 0.5] and 4 in (0.5, 1]: the value for 75 % is half way through the second."""
    histogram = of(exposed([0.2] * 4 + [0.9] * 4))
    assert histogram.quantile(0.75) == 0.75
    assert histogram.quantile(0.25) == pytest.approx(0.3)
    assert histogram.buckets() == [(0.1, 0.5, 4), (0.5, 1.0, 4)]


@given(st.lists(seconds, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_sum_is_that_of_all_observations(processes: list[list[float]]) -> None:
    every = [observation for observations in processes for observation in observations]
    together = added([exposed(each, count=len(each)) for each in processes], lambda name: max)
    assert of(together).counts == of(exposed(every)).counts
    assert of(together).total == pytest.approx(math.fsum(every))
    assert together.counters["done_total"][()] == len(every)


@given(seconds, seconds)
@settings(max_examples=30, deadline=None)
def test_a_window_holds_what_came_after_its_begin(before: list[float], then: list[float]) -> None:
    window = exposed(before + then, count=7, level=3).since(exposed(before, count=2, level=9))
    assert of(window).counts == of(exposed(then)).counts
    assert of(window).total == pytest.approx(math.fsum(then))
    assert (window.counters["done_total"][()], window.gauges["level"][()]) == (5, 3)


def test_of_a_process_that_restarted_a_window_holds_all() -> None:
    window = exposed([0.2], count=1).since(exposed([0.2, 0.3], count=8))
    assert of(window).count == 1
    assert window.counters["done_total"][()] == 1


def test_what_is_new_counts_from_zero() -> None:
    assert of(exposed([0.2], count=1).since(Exposition())).count == 1


def test_different_buckets_are_not_added() -> None:
    with pytest.raises(ExpositionError, match="different versions"):
        sum_of([Histogram((1.0, math.inf), (0, 1), 2.0), Histogram((2.0, math.inf), (0, 1), 2.0)])


@pytest.mark.parametrize(
    "text",
    ["<html>", "x y", "# TYPE h histogram\nh_bucket 1\n", '# TYPE h histogram\nh_bucket{le="1"} 1\n'],
    ids=["a page", "no number", "a bucket without a bound", "no bucket for infinity"],
)
def test_what_is_no_exposition(text: str) -> None:
    with pytest.raises(ExpositionError, match="no metrics in Prometheus's format"):
        parse(text)
