"""Planning: the search, the bounds, costs against independent sums, what binds where there is no plan, the command.

Not covered: the simulations behind it (test_simulate.py, test_scenarios.py), and a plan compared with a live run
(docs/planning.md says how it was).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from bench.planning.limits import Limit, LoneEngine, floor_of
from bench.planning.plan import HEADROOM, Plan, Planner, ProfilePlan, best_of, make_plan
from bench.planning.report import as_json, print_plan
from bench.planning.search import NEIGHBOURS, smallest
from bench.planning.trial import Target, trial_of
from bench.simulation import ClusterShape, Delays
from bench.simulation.play import Play, asked, play_out
from bench.simulation.processes import Processes
from bench.workloads import WorkloadSpec, build_workload
from kvcache.profiles import profile
from kvcluster.cli import app
from kvcluster.commands.plan import parse_prices
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
HOT = Path(__file__).parents[2] / "examples" / "rag.yaml"


def play(name: str = "hot", limit: int = 40, rate: float = 40.0, max_model_len: int = 4096) -> Play:
    engine = EngineConfig(
        blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=max_model_len
    )
    shape = ClusterShape(1, engine, LLAMA.latency, LLAMA.model)
    return Play(shape, "cache_aware", WorkloadSpec(name, limit=limit, rate=rate))


def planner(target: Target, played: Play | None = None, most: int = 8) -> Planner:
    return Planner(played or play(), target, Processes(1), most)


# --- the search ---


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(1, 5))
def test_what_is_found_does_with_its_neighbours_and_nothing_near_below_does(does: list[bool], at_a_time: int) -> None:
    asked_about: list[int] = []

    def try_out(numbers: list[int]) -> list[bool]:
        asked_about.extend(numbers)
        return [does[number - 1] for number in numbers]

    def counts(number: int) -> bool:
        return all(does[number - 1 : number + NEIGHBOURS])

    most = len(does)
    found = smallest(try_out, most, at_a_time)
    assert len(asked_about) == len(set(asked_about)), "each is tried once"
    assert all(1 <= number <= most for number in asked_about)
    if found is None:
        assert not does[most - 1] or not counts(most) or most not in asked_about
    else:
        assert counts(found)
        assert not any(counts(number) for number in range(max(found - NEIGHBOURS, 1), found))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 4))
def test_of_a_monotone_curve_the_first_is_found(first: int, most: int, at_a_time: int) -> None:
    found = smallest(lambda numbers: [number >= first for number in numbers], most, at_a_time)
    assert found == (first if first <= most else None)


def test_a_lucky_number_is_passed_over() -> None:
    """4 will do, 5 and 6 will not."""
    assert smallest(lambda numbers: [number == 4 or number >= 7 for number in numbers], 32) == 7


# --- trials ---


def test_figures_of_a_trial_are_sums_over_its_records() -> None:
    _, records = play_out(play(limit=50))
    trial = trial_of(records, 3)
    prompt, output = sum(r.prompt_tokens for r in records), sum(r.output_tokens for r in records)
    lasts = max(r.finished for r in records) - min(r.sent for r in records)
    assert (trial.prompt_tokens, trial.output_tokens, trial.failed, trial.requests) == (prompt, output, 0, 50)
    assert trial.hit_rate == pytest.approx(sum(r.cached_tokens for r in records) / prompt)
    assert trial.in_flight == pytest.approx(sum(r.finished - r.sent for r in records) / lasts / 3)
    hours = 3 * lasts / 3600 / ((prompt + output) / 1e6)
    assert trial.worker_hours_per_million() == pytest.approx(hours)
    assert trial.dollars_per_million(2.5) == pytest.approx(2.5 * hours)
    assert trial.dollars_per_million(None) is None


def test_failures_and_a_growing_queue_miss_a_target() -> None:
    _, records = play_out(play(limit=50))
    trial = replace(trial_of(records, 1), ttft_p95=0.1, late_ttft_p95=0.1, tpot_p95=0.02)
    target = Target(0.2, 0.05)
    assert trial.met(target)
    assert not replace(trial, failed=2).met(target)
    assert not replace(trial, late_ttft_p95=0.5).met(target), "its queue grows"
    assert not replace(trial, tpot_p95=0.06).met(target)
    assert not replace(trial, ttft_p95=None).met(target)
    assert replace(trial, tpot_p95=0.06).met(Target(ttft_p95=0.2))


@pytest.mark.parametrize(
    ("bounds", "said"),
    [pytest.param((None, None), "give --ttft-p95", id="none"), pytest.param((0.0, None), "above 0", id="zero")],
)
def test_a_target_needs_bounds(bounds: tuple[float | None, float | None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Target(*bounds)


# --- plans ---


@cache
def planned() -> Plan:
    return make_plan(planner(Target(0.3, 0.03)), [LLAMA.name], {LLAMA.name: 2.0}, LLAMA.name)


def test_the_smallest_cluster_that_meets_the_target_is_recommended() -> None:
    target, (found,) = planned().target, planned().profiles
    assert found.workers is not None
    assert found.workers > 1
    by_workers = {trial.workers: trial for trial in found.trials}
    assert all(by_workers[number].met(target) for number in range(found.workers, found.workers + NEIGHBOURS + 1))
    assert not by_workers[found.workers - 1].met(target)
    _, records = play_out(replace(play(), shape=replace(play().shape, workers=found.workers)))
    times = sorted(record.ttft for record in records)
    assert found.chosen.ttft_p95 == pytest.approx(times[37] + 0.05 * (times[38] - times[37]))
    assert found.dollars_an_hour == 2.0 * found.workers
    assert found.capacity.rate_met >= found.chosen.rate / found.workers
    assert found.capacity.rate_missed is None or found.capacity.rate_missed > found.capacity.rate_met
    tried = [found.chosen.rate / found.workers * factor for factor in (1.0, *HEADROOM)]
    assert any(found.capacity.rate_met == pytest.approx(rate, rel=0.01) for rate in tried)
    assert planned().asked_rate == 40.0
    assert found.chosen.rate != pytest.approx(40.0, rel=0.05), "a sample of 40 arrivals has a rate of its own"


def test_a_prefill_that_takes_too_long_alone_is_said() -> None:
    found = planner(Target(ttft_p95=0.02), play("uniform")).plan(LLAMA.name, own=LLAMA.name)
    assert found.limit is Limit.TTFT_ALONE
    assert found.trials == ()
    longest = max(len(p.tokens) for p in asked(build_workload(play("uniform").workload), play().shape))
    assert f"longest prompt has {longest}" in found.why
    assert "more workers do not" in found.why


def test_decoding_that_takes_too_long_alone_is_said() -> None:
    found = planner(Target(tpot_p95=0.010)).plan(LLAMA.name, own=LLAMA.name)
    assert found.limit is Limit.TPOT_ALONE
    assert "TPOT p95 is 15.9 ms at best" in found.why


def test_prompts_that_no_worker_takes_are_said() -> None:
    found = planner(Target(1.0), play(max_model_len=1100)).plan(LLAMA.name, own=LLAMA.name)
    assert found.limit is Limit.CONTEXT
    assert "1,100 tokens" in found.why
    mixed = planner(Target(1.0), play(max_model_len=512)).plan(LLAMA.name, own=LLAMA.name)
    assert mixed.why.startswith("all of the requests")


def test_too_few_workers_are_said_and_whether_more_would_help() -> None:
    found = planner(Target(tpot_p95=0.02), most=2).plan(LLAMA.name, own=LLAMA.name)
    assert found.limit is Limit.MOST_WORKERS
    assert "with 2 workers, the most that were allowed, and falls with more of them" in found.why


def test_it_is_said_when_more_workers_do_not_help() -> None:
    """The first requests for a prefix that none has cached yet meet on one worker."""
    found = planner(Target(ttft_p95=0.19), play(limit=40)).plan(LLAMA.name, own=LLAMA.name)
    assert found.limit is Limit.MOST_WORKERS
    assert "no longer falls with more of them" in found.why


def test_the_floor_is_that_of_single_requests() -> None:
    shape = play().shape
    engine = LoneEngine(shape)
    for tokens in (1, 16, 17, 500, 2048):
        assert engine.prefill(tokens) == pytest.approx(LLAMA.latency.prefill(math.ceil(tokens / 16)))
    assert engine.decode(1000, 32) == pytest.approx(LLAMA.latency.decode_step(1, 1016))
    floor = floor_of(asked(build_workload(play("uniform").workload), shape), shape, Delays(0.0, 0.0), 4)
    lengths = sorted(len(prompt.tokens) for prompt in asked(build_workload(play("uniform").workload), shape))
    assert floor.longest_prompt == lengths[-1]
    assert floor.ttft_p95 == pytest.approx(engine.prefill(lengths[round(0.95 * 39)]))


def test_the_cheapest_profile_is_best_and_without_prices_the_fewest_workers() -> None:
    def of(name: str, price: float | None, workers: int | None) -> ProfilePlan:
        return ProfilePlan(name, price, workers, (), None)

    assert best_of([of("small", 1.0, 8), of("large", 5.0, 2), of("tiny", 0.1, None)]) == "small"
    assert best_of([of("small", 1.0, 8), of("large", None, 2), of("tiny", 0.1, None)]) == "large"
    assert best_of([of("tiny", 0.1, None)]) is None


def test_another_profile_is_planned_with_its_own_engine() -> None:
    name = "llama-3.1-8b-h100-80gb"
    made = make_plan(planner(Target(0.3), play(limit=10), most=3), [LLAMA.name, name], {}, LLAMA.name)
    floors = {each.profile: each.floor for each in made.profiles}
    assert floors[LLAMA.name].tpot_p95 > 2 * floors[name].tpot_p95


def test_what_is_shown_is_what_is_written() -> None:
    made = planned()
    fields = orjson.loads(orjson.dumps(as_json(made)))
    console = Console(record=True, width=140)
    print_plan(console, made)
    shown = console.export_text()
    (found,) = fields["profiles"]
    assert f"{found['workers']} workers meet TTFT p95 <= 300 ms, TPOT p95 <= 30.0 ms" in shown
    chosen = next(each for each in found["trials"] if each["trial"]["workers"] == found["workers"])
    assert chosen["met"]
    assert f"${chosen['dollars_per_million_tokens']:.3g} a million tokens" in shown.replace("\n", " ")


# --- the command ---


def run(tmp_path: Path, *options: str) -> tuple[int, str]:
    load = ["-w", "hot", "--limit", "20", "--rate", "30", "--jobs", "1", "--max-workers", "8", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, ["plan", str(HOT), *load, *options])
    return ran.exit_code, ran.output


def test_the_command_prints_and_writes_a_plan(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--tpot-p95", "30ms", "--price", "2", "--json")
    assert code == 0
    assert orjson.loads(said) == orjson.loads((tmp_path / "plan.json").read_bytes())
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json", "plan.png", "plan.svg"}
    assert (tmp_path / "plan.svg").read_text().count("<path") > 20


def test_a_target_that_cannot_be_met_is_exit_code_1(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--tpot-p95", "1ms")
    assert code == 1
    assert "the target cannot be met" in said


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="no bound"),
        pytest.param(("--ttft-p95", "soon"), id="no duration"),
        pytest.param(("--ttft-p95", "1s", "--profiles", "gpu"), id="an unknown profile"),
        pytest.param(("--ttft-p95", "1s", "--price", "gpu=2"), id="a price of another profile"),
    ],
)
def test_wrong_input_is_exit_code_2(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run(tmp_path, *options)[0] == 2


def test_prices_are_read() -> None:
    assert parse_prices(["2.5"], ["a", "b"]) == {"a": 2.5, "b": 2.5}
    assert parse_prices(["2.5", "b=1"], ["a", "b"]) == {"a": 2.5, "b": 1.0}
    with pytest.raises(ValueError, match="PROFILE=DOLLARS"):
        parse_prices(["a=-1"], ["a"])
