"""Objectives of TTFT and TPOT, and the goodput of a run under them.

Not covered: the options of the commands and the search for a rate (test_experiment.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.record import ErrorCause, Record
from bench.slo import Slo, parse_duration

SLO = Slo(ttft=0.5, tpot=0.05)


def record(at: int = 0, ttft: float = 0.1, tpot: float = 0.01, tokens: int = 11, error: bool = False) -> Record:
    first = at + ttft
    cause = ErrorCause.TIMEOUT if error else None
    return Record(at, at, at, first, first + tpot * (tokens - 1), output_tokens=tokens, error=cause)


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        (record(), True),
        (record(ttft=0.6), False),
        (record(tpot=0.06), False),
        (record(tpot=0.06, tokens=1), True),
        (record(error=True), False),
        (Record(0, 0.0, 0.0), False),
    ],
    ids=["in time", "late", "slow", "one token has no TPOT", "failed", "no first token"],
)
def test_a_request_meets_every_objective_or_none_counts(request_: Record, met: bool) -> None:
    assert SLO.met_by(request_) is met


def test_without_bounds_every_answer_will_do() -> None:
    assert not Slo()
    assert Slo().met_by(record(ttft=1e6, tpot=1e6))
    assert not Slo().met_by(record(error=True))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1))
def test_goodput_is_a_count_over_the_time_until_the_last_answer(seen: list[tuple[int, int, int, bool]]) -> None:
    """In tenths of a second and hundredths of a second a token, with bounds of 0.5 s and 50 ms."""
    records = [record(at, ttft / 10 - 0.01, tpot / 100 - 0.001, error=error) for at, ttft, tpot, error in seen]
    figures = SLO.goodput(reversed(records))
    assert figures is not None
    met = [r for r in records if SLO.met_by(r)]
    ends = max(r.finished for r in records if r.finished is not None)
    assert figures.met == len(met)
    assert figures.attainment == pytest.approx(len(met) / len(records))
    assert figures.requests_per_second == pytest.approx(len(met) / (ends - min(at for at, *_ in seen)))
    assert figures.failed == sum(error for *_, error in seen)
    assert figures.late == sum(ttft > 5 for _, ttft, _, error in seen if not error)
    assert figures.slow == sum(tpot > 5 for _, _, tpot, error in seen if not error)


def test_a_run_without_requests_has_no_goodput() -> None:
    assert SLO.goodput([]) is None


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_is_above_zero(bound: float) -> None:
    with pytest.raises(ValueError, match="TPOT must be above 0"):
        Slo(tpot=bound)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("1.5s", 1.5), ("2m", 120.0), (" 0.25 ", 0.25), ("1e3ms", 1.0), ("0", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "5 hours", "-1s", "inf", "nan", "5sm"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)
