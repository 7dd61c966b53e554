"""Repeats, confidence intervals, the search for a rate, and who wins: with plays that need no cluster.

Not covered: what is written of an experiment (test_comparison.py), and playing live (tests/e2e/test_foreign.py) or
simulated (test_simulate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gamma, pi, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.estimates import T, difference, estimate
from bench.experiment import ExperimentOptions, Outcome, Played, Run, conduct
from bench.rate_search import SearchOptions, find_rate
from bench.record import ErrorCause, Record
from bench.report import ranked, why
from bench.result import Measurement, RunInfo, WarmUp, summarise
from bench.slo import Slo
from bench.workloads import WorkloadError, WorkloadSpec

# --- intervals ---


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_the_quantiles_of_t_leave_out_a_fortieth_on_either_side(freedom: int) -> None:
    """By Simpson's rule over the density."""

    def density(t: float) -> float:
        scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
        return float(scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2))

    top, steps = T[freedom - 1], 20_000
    width = top / steps
    inner = sum((4 if n % 2 else 2) * density(n * width) for n in range(1, steps))
    assert 0.5 + width / 3 * (density(0) + inner + density(top)) == pytest.approx(0.975, abs=2e-5)


def test_an_interval_over_five_runs_is_the_textbooks() -> None:
    found = estimate([4.9, 5.1, 5.0, 4.8, 5.2])
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(5.0), 5)
    assert found.margin == pytest.approx(2.776 * 0.158114 / sqrt(5), rel=1e-4)
    assert found.low == pytest.approx(5.0 - (found.margin or 0))


def test_one_run_has_no_interval_and_a_missing_figure_no_estimate() -> None:
    single = estimate([3.0])
    assert single is not None
    assert (single.mean, single.low, single.margin) == (3.0, None, None)
    assert estimate([3.0, None]) is None
    assert estimate([]) is None


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(0.1, 10))
def test_what_a_seed_does_to_both_cancels_out_of_a_difference(values: list[float], lead: float) -> None:
    found = difference([value + lead for value in values], values)
    assert found is not None
    assert found.mean == pytest.approx(lead, rel=1e-6)
    assert found.margin == pytest.approx(0.0, abs=1e-6)


# --- the search ---


async def searched(limit: float, start: float, tolerance: float) -> tuple[float | None, float | None, list[float]]:
    asked: list[float] = []

    async def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    bracket = await find_rate(meets, start, tolerance)
    return bracket.passed, bracket.failed, asked


@settings(max_examples=40)
@given(limit=st.floats(0.1, 1000), start=st.floats(1, 100), tolerance=st.floats(0.01, 0.5))
async def test_the_limit_is_found_to_within_the_tolerance(limit: float, start: float, tolerance: float) -> None:
    passed, failed, asked = await searched(limit, start, tolerance)
    assert passed is not None
    assert failed is not None
    assert passed <= limit < failed <= passed * (1 + tolerance) * (1 + 1e-12)
    assert len(asked) == len(set(asked)) < 40


async def test_a_limit_out_of_reach_is_said_to_be_so() -> None:
    passed, failed, _ = await searched(1e12, 10, 0.05)
    assert passed == 10 * 2**12
    assert failed is None
    passed, failed, _ = await searched(1e-12, 10, 0.05)
    assert passed is None
    assert failed == 10 / 2**12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slo": Slo()}, "--slo-ttft or --slo-tpot"),
        ({"slo": Slo(ttft=1), "attainment": 0.0}, "attainment must be above 0"),
        ({"slo": Slo(ttft=1), "tolerance": 0.0}, "tolerance must be between"),
    ],
    ids=["no SLO", "no share", "no tolerance"],
)
def test_a_search_for_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


# --- experiments ---

CAPACITY = {"good": 40.0, "bad": 12.0}


class Queue:
    """Requests every 1 / rate seconds, one server per contender: the time to first token is `ttft` for all below its
    capacity, and grows with every request above it."""

    def __init__(self, ttft: float = 0.1) -> None:
        self.ttft = ttft
        self.played: list[tuple[str, int, float]] = []

    async def __call__(self, contender: str, spec: WorkloadSpec) -> Played:
        rate = spec.rate or 8.0
        self.played.append((contender, spec.seed, rate))
        behind = max(0.0, 1 / CAPACITY[contender] - 1 / rate)
        records = []
        for index in range(50):
            at = index / rate
            first = at + self.ttft + index * behind + spec.seed / 1000
            records.append(Record(index, at, at, first, first + 0.1, "w", "", 0, 100, 50, 11))
        return Played(records, RunInfo(contender, spec.seed, {"workload": "queue", "mode": "live"}))


kept: list[Run] = []


def keep(run: Run, records: Sequence[Record]) -> None:
    assert len(records) == 50
    kept.append(run)


async def test_every_contender_runs_with_every_seed_before_the_next_seed() -> None:
    play = Queue()
    options = ExperimentOptions(WorkloadSpec("uniform", seed=5), repeats=3)
    outcomes = await conduct(play, ["good", "bad"], options, keep)
    assert [(name, seed) for name, seed, _ in play.played] == [
        (name, seed) for seed in (5, 6, 7) for name in ("good", "bad")
    ]
    p50 = outcomes[0].estimate("ttft_p50_seconds")
    assert p50 is not None
    assert p50.mean == pytest.approx(0.106)
    assert p50.margin == pytest.approx(4.303 * 0.001 / sqrt(3), rel=1e-3)
    same = outcomes[0].versus(outcomes[1], "ttft_p50_seconds")
    assert same is not None
    assert (same.mean, same.margin) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert "3 repeats do not tell that difference from chance" in why(outcomes)


async def test_a_search_gives_each_contender_its_highest_rate() -> None:
    slo = SearchOptions(Slo(ttft=0.2), attainment=0.9, tolerance=0.02)
    options = ExperimentOptions(WorkloadSpec("uniform"), Measurement(WarmUp(requests=10)), repeats=2, search=slo)
    outcomes = await conduct(Queue(), ["bad", "good"], options, keep)
    found = {outcome.contender: outcome.found for outcome in outcomes}
    for name, capacity in CAPACITY.items():
        search = found[name]
        assert search is not None
        assert search.bracket.passed is not None
        # Of 40 measured requests 36 must be in time: number 45 of all, which waits 45 times what one is behind.
        limit = 1 / (1 / capacity - 0.1 / 45)
        assert search.bracket.passed == pytest.approx(limit, rel=0.05)
        assert [probe.met for probe in search.probes] == sorted((probe.met for probe in search.probes), reverse=True)
    best, other = ranked(outcomes)
    assert best.contender == "good"
    assert best.runs[0].result.goodput is not None
    assert best.runs[0].result.goodput.attainment >= 0.9
    assert best.runs[0].result.warm_up_requests == 10
    assert why(outcomes).startswith("good serves the most: ")
    assert "with 90% of the requests within TTFT <= 200 ms, against bad " in why(outcomes)
    assert best.versus(other, "hit_rate") is None, "rates differ"


@pytest.mark.parametrize("repeats", [0, 32])
def test_a_number_of_repeats_that_has_no_interval_is_refused(repeats: int) -> None:
    with pytest.raises(ValueError, match="--repeats must be between 1 and 31"):
        ExperimentOptions(WorkloadSpec("uniform"), repeats=repeats)


def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    options = ExperimentOptions(WorkloadSpec("uniform", limit=20), Measurement(WarmUp(requests=20)))
    with pytest.raises(WorkloadError, match="a warm-up of 20 requests leaves none of the 20 to measure"):
        options.check()


# --- who wins ---


def of(contender: str, ttft: float, cached: int, errors: int = 0) -> Outcome:
    records = [Record(i, i, i, i + ttft * (1 + i / 50), i + 9, "ab"[i % 2], "", 0, 100, cached, 4) for i in range(50)]
    records += [Record(50 + i, 50, 50, error=ErrorCause.UNAVAILABLE, detail="HTTP 503") for i in range(errors)]
    result = summarise(records, RunInfo(contender, 0, {"workload": "rag", "mode": "live"}))
    return Outcome(contender, [Run(contender, 0, None, result)])


def test_the_winner_starts_answering_soonest_and_does_answer() -> None:
    outcomes = [of("round_robin", 0.4, 0), of("cache_aware", 0.1, 64), of("broken", 0.01, 64, errors=5)]
    assert ranked(outcomes)[0].contender == "cache_aware"
    sentence = why(outcomes[:2])
    assert sentence.startswith("cache_aware starts answering soonest")
    assert "64.0% of the prompt tokens were cached" in sentence
    assert "1,800 prompt tokens instead of 5,000" in sentence


def test_one_that_fails_is_not_compared_with_but_named() -> None:
    outcomes = [of("round_robin", 0.4, 0), of("cache_aware", 0.1, 64), of("broken", 0.01, 64, errors=5)]
    assert why(outcomes).startswith(
        "Of those that fail at most 1% of the requests (broken fail more), cache_aware starts answering soonest: "
    )
    assert "(round_robin), the next best" in why(outcomes)
    assert why([outcomes[0], outcomes[2]]).endswith("TTFT p50 596 ms.")


def test_without_any_answer_nobody_wins() -> None:
    result = summarise([Record(0, 0, 0, error=ErrorCause.TIMEOUT)], RunInfo("x", 0, {}))
    assert why([Outcome("x", [Run("x", 0, None, result)])]) == "No strategy answered a request."
