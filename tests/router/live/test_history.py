"""The history of a router: its steps add up to what the counters say, and its quantiles are those of the observations.

Not covered: what is read from which counter (`test_endpoints`).
"""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.live.history import STEP_SECONDS, STEPS, Reading, Recorder, Step, quantile, series

BOUNDS = (0.01, 0.1, 1.0)
NO_BUCKETS = (0, 0, 0, 0)


def reading(requests: int = 0, cached: int = 0, ttft: tuple[int, ...] = NO_BUCKETS) -> Reading:
    return Reading(requests, 10 * requests, cached, 0.25 * cached, ttft, NO_BUCKETS, 6, 3.0)


def recorded(readings: list[tuple[float, Reading]]) -> Recorder:
    recorder = Recorder()
    for at, each in readings:
        recorder.take(each, at)
    return recorder


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=50)
def test_the_steps_add_up_to_what_was_counted(increments: list[tuple[int, int]]) -> None:
    """A reading may be late by whole steps: what happened is in the next one then."""
    at, requests, readings = 1_000_000.0, 0, [(1_000_000.0, reading())]
    for more, late in increments:
        at, requests = at + STEP_SECONDS * (1 + late), requests + more
        readings.append((at + 0.02, reading(requests, 2 * requests, (0, requests, 0, 0))))
    steps = recorded(readings).steps()
    assert sum(step.requests for step in steps) == requests
    assert sum(step.cached_tokens for step in steps) == 2 * requests
    assert sum(step.ttft[1] for step in steps) == requests
    assert sum(step.seconds for step in steps) == pytest.approx(at + 0.02 - 1_000_000.0)
    history = series(steps, BOUNDS, BOUNDS)
    assert [after - before for before, after in zip(history.at, history.at[1:], strict=False)] == [5] * (
        len(history.at) - 1
    )
    measured = [(step.number * 5, step.requests / step.seconds) for step in steps]
    shown = dict(zip(history.at, history.requests_per_second, strict=True))
    assert {end: rate for end, rate in shown.items() if rate is not None} == pytest.approx(dict(measured), abs=1e-6)


def test_the_history_is_bounded() -> None:
    readings = [(STEP_SECONDS * number + 0.02, reading(number)) for number in range(3 * STEPS)]
    history = series(recorded(readings).steps(), BOUNDS, BOUNDS)
    assert len(history.at) == STEPS
    assert history.at[-1] == (3 * STEPS - 1) * 5
    assert set(history.requests_per_second) == {0.2}


def test_a_step_in_which_nothing_came_has_no_rates() -> None:
    history = series(recorded([(5.02, reading()), (10.02, reading())]).steps(), BOUNDS, BOUNDS)
    assert (history.requests_per_second, history.hit_rate, history.ttft_p50) == ((0.0,), (None,), (None,))
    assert history.load_skew == (2.0,)


def test_a_clock_that_is_set_back_starts_the_history_anew() -> None:
    recorder = recorded([(100.02, reading(1)), (105.02, reading(2)), (110.02, reading(3))])
    recorder.take(reading(4), 110.03)
    assert [step.number for step in recorder.steps()] == [21, 22]
    recorder.take(reading(4), 107.0)
    assert [step.number for step in recorder.steps()] == [21, 22]
    recorder.take(reading(5), 50.02)
    recorder.take(reading(7), 55.02)
    assert [(step.number, step.requests) for step in recorder.steps()] == [(11, 2)]


def test_a_reader_gets_the_steps_that_it_does_not_have() -> None:
    recorder = recorded([(5.0 * number + 0.02, reading(number)) for number in range(5)])
    assert [step.number for step in recorder.steps(after=2)] == [3, 4]


@given(st.lists(st.floats(0.001, 2.0), min_size=1, max_size=60), st.sampled_from([0.5, 0.95]))
@settings(max_examples=60)
def test_a_quantile_lies_in_the_bucket_of_the_observation(values: list[float], share: float) -> None:
    counts = [0, 0, 0, 0]
    for value in values:
        counts[bisect_left(BOUNDS, value)] += 1
    found = quantile(share, BOUNDS, counts)
    rank = share * len(values)
    exact = sorted(values)[min(int(rank) if rank % 1 else int(rank) - 1, len(values) - 1)]
    bucket = bisect_left(BOUNDS, exact)
    assert found is not None
    low, high = (0.0, *BOUNDS)[bucket], (*BOUNDS, BOUNDS[-1])[bucket]
    assert min(low, high) - 1e-6 <= found <= high + 1e-6


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param((10, 0, 0, 0), 0.005, id="first bucket"),
        pytest.param((0, 10, 0, 0), 0.055, id="within a bucket"),
        pytest.param((5, 5, 0, 0), 0.01, id="at a bound"),
        pytest.param((0, 0, 0, 9), 1.0, id="above all bounds"),
        pytest.param((0, 0, 0, 0), None, id="nothing observed"),
    ],
)
def test_a_median_is_interpolated(counts: tuple[int, ...], expected: float | None) -> None:
    """The figures are those of Prometheus's `histogram_quantile`."""
    assert quantile(0.5, BOUNDS, counts) == expected


def test_the_skew_of_several_routers_is_the_mean_of_theirs() -> None:
    one = Step(7, 5.0, 10, 100, 50, 1.0, NO_BUCKETS, NO_BUCKETS, 6, 3.0)
    two = Step(7, 5.0, 30, 100, 0, 0.5, NO_BUCKETS, NO_BUCKETS, 2, 1.0)
    history = series([one + two], BOUNDS, BOUNDS)
    assert (history.requests_per_second, history.hit_rate) == ((8.0,), (0.25,))
    assert (history.load_skew, history.prefill_seconds_saved) == ((2.0,), (1.5,))
