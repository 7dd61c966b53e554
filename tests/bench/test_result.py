"""What is computed from a run's records, and the files that both go to.

Not covered: comparisons of several runs (test_experiment.py) and what is written of them (test_comparison.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.record import ErrorCause, Record, RecordError, read_records, write_records
from bench.result import (
    Measurement,
    RunInfo,
    WarmUp,
    WorkerTally,
    block_range,
    quantile,
    running_skew,
    summarise,
    summary,
)
from bench.slo import Slo

INFO = RunInfo("cache_aware", 3, {"workload": "rag", "mode": "live"}, worker_ids=("a", "b"))

DOWN = ErrorCause.UNAVAILABLE


def record(
    index: int, *, cached: int = 0, ttft: float = 0.1, worker: str = "a", error: ErrorCause | None = None
) -> Record:
    return Record(
        index=index,
        scheduled=index,
        sent=index,
        first_token=index + ttft,
        finished=index + ttft + 1,
        worker=worker,
        reason="prefix_match" if cached else "least_cost",
        matched_blocks=cached // 16,
        prompt_tokens=100,
        cached_tokens=cached,
        output_tokens=4,
        error=error,
    )


def test_hits_are_requests_with_half_of_their_prompt_cached() -> None:
    result = summarise([record(0, cached=96, ttft=0.1), record(1, cached=48, ttft=0.3), record(2, ttft=0.5)], INFO)
    assert result.hit_rate == pytest.approx(144 / 300)
    assert (result.hit.requests, result.miss.requests) == (1, 2)
    assert result.hit.ttft_seconds is not None
    assert result.hit.ttft_seconds.p50 == pytest.approx(0.1)
    assert result.miss.ttft_seconds is not None
    assert result.miss.ttft_seconds.avg == pytest.approx(0.4)
    assert result.match_blocks == {"0": 1, "2-3": 1, "4-7": 1}


def test_a_worker_without_requests_counts_for_the_mean() -> None:
    result = summarise([record(0), record(1)], INFO)
    assert result.workers["a"].uncached_tokens == 200
    assert result.workers["b"].requests == 0
    assert result.prefill_skew == 2.0


def test_errors_are_counted_by_cause_and_kept_out_of_the_figures() -> None:
    result = summarise(
        [record(0, ttft=0.1), record(1, ttft=9, error=DOWN), record(2, error=DOWN)],
        INFO,
    )
    assert (result.requests, result.errors, result.error_causes) == (3, 2, {"unavailable": 2})
    assert result.ttft_seconds is not None
    assert result.ttft_seconds.p99 == pytest.approx(0.1)


def test_a_run_without_any_answer_has_a_result() -> None:
    result = summarise([Record(0, 0.0, 0.0, error=ErrorCause.CONNECTION, detail="ClientOSError")], INFO)
    assert result.ttft_seconds is None
    assert result.hit_rate is None
    assert result.prefill_skew is None
    assert orjson.loads(orjson.dumps(result))["errors"] == 1


def test_a_server_that_reports_no_cached_tokens_has_no_hit_rate() -> None:
    plain = Record(0, 0.0, 0.0, 0.1, 1.0, prompt_tokens=10, output_tokens=2)
    result = summarise([plain], INFO)
    assert result.hit_rate is None
    assert result.workers["unnamed"].requests == 1


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.sampled_from("abc"), st.integers(1, 9)), max_size=12)
)
def test_tpot_and_running_answers_are_what_a_count_at_every_second_gives(
    seen: list[tuple[int, int, str, int]],
) -> None:
    """Every time is a whole second, so what holds half-way between two seconds holds for the whole of it."""
    records = [
        Record(n, 0.0, 0.0, float(first), float(first + lasts), worker, output_tokens=tokens)
        for n, (first, lasts, worker, tokens) in enumerate(seen)
    ]
    counts = [
        [sum(first <= at < first + lasts for first, lasts, on, _ in seen if on == worker) for worker in "abc"]
        for at in range(60)
    ]
    total = sum(map(sum, counts))
    skew = sum(map(max, counts)) / (total / 3) if total else None
    assert running_skew(records, "abc") == (pytest.approx(skew) if total else None)
    assert summarise(records, RunInfo("", 0, {}, worker_ids="abc")).running_skew == running_skew(records, "abc")
    tpots = sorted(lasts / (tokens - 1) for _, lasts, _, tokens in seen if tokens > 1)
    figures = summarise(records, INFO).tpot_seconds
    assert (figures is None) == (not tpots)
    if figures is not None:
        assert (figures.avg, figures.p50) == pytest.approx((sum(tpots) / len(tpots), quantile(tpots, 0.5)))


def test_the_file_of_a_result_has_the_documented_fields() -> None:
    written = orjson.loads(orjson.dumps(summarise([record(0, cached=96)], INFO)))
    names = "strategy requests errors hit_rate hit miss match_blocks config versions seed running_skew"
    assert set(names.split()) <= set(written)
    assert (
        set(written["ttft_seconds"])
        == set(written["latency_seconds"])
        == set(written["tpot_seconds"])
        == {"avg", "p50", "p95", "p99"}
    )
    assert set(written["workers"]["a"]) == {"requests", "prompt_tokens", "uncached_tokens", "output_tokens"}


@given(st.lists(st.tuples(st.integers(0, 100), st.sampled_from("abc"), st.booleans()), max_size=30))
def test_the_figures_of_a_run_are_the_sums_over_its_answered_requests(seen: list[tuple[int, str, bool]]) -> None:
    records = [
        record(index, cached=cached, worker=worker, error=None if answered else DOWN)
        for index, (cached, worker, answered) in enumerate(seen)
    ]
    result = summarise(records, INFO)
    cached = [cached for cached, _, answered in seen if answered]
    assert (result.requests, result.errors) == (len(seen), len(seen) - len(cached))
    assert result.hit_rate == (pytest.approx(sum(cached) / (100 * len(cached))) if cached else None)
    assert result.computed_tokens == sum(100 - each for each in cached)
    assert (result.hit.requests, result.miss.requests) == (
        sum(each >= 50 for each in cached),
        sum(each < 50 for each in cached),
    )
    assert sum(result.match_blocks.values()) == len(cached)
    for name in "abc":
        own = [each for each, worker, answered in seen if worker == name and answered]
        tally = result.workers.get(name)
        assert (tally.requests, tally.uncached_tokens) == (len(own), 100 * len(own) - sum(own)) if tally else not own


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_stay_within_the_values_and_grow(values: list[float], q: float) -> None:
    ordered = sorted(values)
    assert ordered[0] <= quantile(ordered, q) <= ordered[-1]
    assert quantile(ordered, q) <= quantile(ordered, min(1.0, q + 0.1))


def test_quantiles_interpolate() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    figures = summary([4.0, 2.0])
    assert figures is not None
    assert (figures.avg, figures.p50) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("blocks", "name"), [(0, "0"), (1, "1"), (2, "2-3"), (3, "2-3"), (4, "4-7"), (64, "64-127"), (127, "64-127")]
)
def test_block_ranges(blocks: int, name: str) -> None:
    assert block_range(blocks) == name


def test_records_survive_their_file(tmp_path: Path) -> None:
    records = [record(0, cached=32), Record(1, 1.0, 1.5, error=ErrorCause.CONNECTION, detail="ClientOSError")]
    write_records(tmp_path / "raw.jsonl", records)
    assert read_records(tmp_path / "raw.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(RecordError, match="line 1"):
        read_records(tmp_path / "bad.jsonl")


def test_a_warm_up_is_left_out_of_every_figure() -> None:
    records = [record(index, cached=96 if index < 4 else 0, ttft=9 if index < 4 else 0.2) for index in range(10)]
    by_number, by_time = (
        summarise(records, INFO, Measurement(warm_up)) for warm_up in (WarmUp(requests=4), WarmUp(seconds=4.0))
    )
    for result in (by_number, by_time):
        assert (result.requests, result.warm_up_requests, result.hit_rate) == (6, 4, 0.0)
        assert result.ttft_seconds is not None
        assert result.ttft_seconds.p99 == pytest.approx(0.2)
        assert result.computed_tokens == 600
        # From the arrival of the first that counts, at 4 s, to the end of the last, at 10.2 s.
        assert result.duration_seconds == pytest.approx(6.2)
        assert result.requests_per_second == pytest.approx(6 / 6.2)
        assert result.output_tokens_per_second == pytest.approx(24 / 6.2)
    assert by_number.config["warm_up"] == "4 requests"
    assert by_time.config["warm_up"] == "4 s"


def test_a_result_has_the_goodput_of_its_slo() -> None:
    records = [record(0, ttft=0.1), record(1, ttft=0.3), record(2, error=DOWN)]
    assert summarise(records, INFO).goodput is None
    goodput = summarise(records, INFO, Measurement(slo=Slo(ttft=0.2))).goodput
    assert goodput is not None
    assert (goodput.met, goodput.late, goodput.failed) == (1, 1, 1)


def test_what_workers_counted_takes_the_place_of_names_in_answers() -> None:
    tallies = {"a": WorkerTally(3, 300, 200, 12), "b": WorkerTally(1, 100, 100, 4)}
    told = replace(INFO, worker_ids=(), tallies=tallies)
    result = summarise([record(n, worker="") for n in range(4)], told)
    assert result.workers == tallies
    assert result.prefill_skew == pytest.approx(200 / 150)
    assert result.running_skew is None
