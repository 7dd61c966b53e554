"""Scenarios of a simulation: what becomes of requests, views and caches when workers and routers fail, join and leave;
groups of workers; several routers; requests that no worker takes.

Not covered: single rules of the router's core (tests/router/core), and the same failures with live processes
(tests/e2e/test_failures.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.prompts import Prompt
from bench.record import ErrorCause, Record
from bench.result import RunInfo, summarise
from bench.simulation import ClusterShape, Delays, Scenario, ScenarioError, Simulation, parse_scenario, read_scenario
from bench.simulation.clock import VirtualClock
from bench.simulation.router import (
    CUT_TIMEOUT,
    RECONNECT,
    RETRY_FLOOR,
    RETRY_SHARE,
    STALL_TIMEOUT,
    SimulatedRouter,
)
from bench.workloads.base import completion, token_ids
from kvcache.keys import DEFAULT_SCOPE
from kvcache.profiles import profile
from router.core.config import FleetConfig
from router.settings import Settings
from router.sync.subscriber import FeedPolicy
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
FLEET = FleetConfig(16, "-", LLAMA.latency)
EXAMPLES = Path(__file__).parents[2] / "examples" / "scenarios"


def shape(workers: int = 4) -> ClusterShape:
    engine = EngineConfig(blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    return ClusterShape(workers, engine, LLAMA.latency, LLAMA.model)


@cache
def asked(count: int = 160, rate: float = 10.0, max_tokens: int = 24) -> tuple[Prompt, ...]:
    """Ten families of prompts, which share their first 480 tokens, in turn and evenly spaced."""
    made = []
    for index in range(count):
        tokens = token_ids(f"family {index * 7 % 10}", 480) + token_ids(f"tail {index}", 40)
        made.append(Prompt(completion(index, index / rate, tokens, max_tokens), tokens, DEFAULT_SCOPE))
    return tuple(made)


def play(
    text: str,
    prompts: tuple[Prompt, ...] | None = None,
    workers: int = 4,
    *,
    strategy: str = "cache_aware",
    delays: Delays | None = None,
    blocks: int | None = None,
) -> Simulation:
    scenario = parse_scenario(text, "scenario.yaml")
    cluster = shape(workers)
    if blocks is not None:
        cluster = replace(cluster, engine=replace(cluster.engine, blocks=blocks, max_model_len=blocks * 16))
    simulation = Simulation(scenario.extend(cluster), strategy, delays, scenario=scenario)
    prompts = asked() if prompts is None else prompts
    records = simulation.run(prompts, lambda sent, answered, failed: None)
    assert [record.index for record in records] == [prompt.request.index for prompt in prompts]
    return simulation


def errors(simulation: Simulation) -> Counter[tuple[ErrorCause | None, str]]:
    return Counter((record.error, record.detail) for record in simulation.records if record.error is not None)


def sent_to(simulation: Simulation, worker: str, after: float, before: float = 1e9) -> list[Record]:
    return [each for each in simulation.records if each.worker == worker and after < each.sent < before]


# --- workers fail ---


def test_requests_of_a_killed_worker_go_elsewhere_unless_their_answer_has_begun() -> None:
    simulation = play("events: [{at: 5.05, type: kill, worker: worker-1}]")
    assert set(errors(simulation)) <= {(ErrorCause.BROKEN_STREAM, "error event: InternalServerError")}
    cut = [record for record in simulation.records if record.error is not None]
    assert len(cut) >= 1
    assert all(record.worker == "worker-1" and record.first_token < 5.06 for record in cut)
    assert sent_to(simulation, "worker-1", 5.06) == []
    assert len(simulation.records) - len(cut) == sum(record.output_tokens == 24 for record in simulation.records)


def test_a_killed_worker_comes_back_with_an_empty_cache() -> None:
    simulation = play("events: [{at: 5, type: kill, worker: worker-1, restartAfter: 2}]", strategy="round_robin")
    back = sent_to(simulation, "worker-1", 7.0)
    assert back, "it gets requests again"
    assert back[0].cached_tokens == 0
    assert simulation.workers[1].info.epoch == 2
    assert simulation.fleets[0].held_blocks("http://worker-1") == held(simulation, 1)


def test_a_fleet_without_workers_answers_503_after_the_retry_deadline() -> None:
    simulation = play("events: [{at: 5, type: kill, worker: worker-0}]", workers=1)
    assert errors(simulation)[ErrorCause.UNAVAILABLE, "HTTP 503 ServiceUnavailableError"] > 100
    first = next(record for record in simulation.records if record.error is ErrorCause.UNAVAILABLE)
    assert first.sent < 5.1


def test_requests_wait_for_the_only_worker_to_restart() -> None:
    simulation = play("events: [{at: 5, type: kill, worker: worker-0, restartAfter: 3}]", workers=1)
    waited = [record for record in simulation.records if 5.1 < record.sent < 7.9]
    assert all(record.error is None for record in waited)
    assert min(record.ttft + record.sent for record in waited) > 8.0


def test_a_frozen_worker_loses_what_it_has_not_begun_after_the_stall_time_out() -> None:
    simulation = play("events: [{at: 5, type: freeze, worker: worker-1, seconds: 14}]", asked(300))
    assert errors(simulation) == {}
    moved = [each for each in simulation.records if each.sent < 7.1 and each.first_token > 14.9]
    assert moved
    assert {each.worker for each in moved} <= {"worker-0", "worker-2", "worker-3"}
    kept = [each for each in simulation.records if each.worker == "worker-1" and each.sent < 5.0 < each.finished]
    assert all(each.finished > 19.0 for each in kept), "answers that had begun go on afterwards"
    assert sent_to(simulation, "worker-1", 7.6, 19.0) == []
    assert sent_to(simulation, "worker-1", 19.1)


def test_a_frozen_worker_makes_no_progress() -> None:
    """Its answer takes longer by the time for which it was frozen."""
    (prompt,) = asked(1)
    plain = play("{}", (prompt,), workers=1).records[0]
    frozen = play("events: [{at: 0.2, type: freeze, worker: worker-0, seconds: 1.5}]", (prompt,), workers=1).records[0]
    assert plain.first_token < 0.2 < plain.finished
    assert frozen.finished - plain.finished == pytest.approx(1.5)


def test_a_slow_worker_gets_less() -> None:
    plain = play("{}", asked(300))
    slow = play("events: [{at: 5, type: slow, worker: worker-1, speed: 0.2, seconds: 30}]", asked(300))
    assert len(sent_to(slow, "worker-1", 8.0, 35.0)) < 0.6 * len(sent_to(plain, "worker-1", 8.0, 35.0))


# --- scaling ---


def test_a_worker_that_leaves_takes_nothing_new_and_finishes() -> None:
    simulation = play("events: [{at: 5, type: leave, worker: worker-2}]", strategy="round_robin")
    assert errors(simulation) == {}
    assert sent_to(simulation, "worker-2", 5.01) == []
    assert [each for each in simulation.records if each.worker == "worker-2" and each.finished > 5.0]
    assert [status.worker_id for status in simulation.fleets[0].workers(20.0)] == ["worker-0", "worker-1", "worker-3"]


def test_the_worker_whose_cache_is_used_least_leaves() -> None:
    before = play("{}")
    scores = Counter()
    for record in before.records:
        if record.finished < 8.0:
            scores[record.worker] += record.matched_blocks
    simulation = play("events: [{at: 8, type: leave}]")
    gone = {"worker-0", "worker-1", "worker-2", "worker-3"} - {s.worker_id for s in simulation.fleets[0].workers(20.0)}
    assert gone == {min(scores, key=lambda name: scores[name])}


def test_workers_join_by_group_and_are_numbered_after_all_others() -> None:
    simulation = play(
        "workers: [{name: small, count: 1, blocks: 300}]\nevents: [{at: 3, type: join, group: small, count: 2}]",
        workers=2,
        strategy="round_robin",
    )
    assert simulation.worker_ids == [f"worker-{number}" for number in range(5)]
    assert [worker.info.capacity for worker in simulation.workers] == [LLAMA.blocks(16)] * 2 + [300] * 3
    assert sent_to(simulation, "worker-4", 3.0)


def test_the_speed_of_a_group_is_found_out() -> None:
    simulation = play("workers: [{name: slow, count: 1, speed: 0.25}]", asked(300), workers=1)
    fast, slow = simulation.fleets[0].workers(40.0)
    assert slow.latency_factor > 2 * fast.latency_factor


# --- routers ---


def test_several_routers_without_delays_see_the_same() -> None:
    """With requests far apart, so that none is on its way, what two routers know is what one router knows."""
    apart = tuple(replace(each, request=replace(each.request, at=3.0 * each.request.index)) for each in asked(60))
    none = Delays(0.0, 0.0)
    one = play("{}", apart, delays=none)
    two = play("routers: {count: 2}", apart, delays=none)
    assert [each.cached_tokens for each in two.records] == [each.matched_blocks * 16 for each in two.records]
    assert summarise(two.records, RunInfo("", 0, {})).hit_rate == pytest.approx(
        summarise(one.records, RunInfo("", 0, {})).hit_rate, abs=0.02
    )


def test_a_late_view_predicts_worse() -> None:
    def wrong(simulation: Simulation) -> int:
        return sum(abs(each.matched_blocks - each.cached_tokens // 16) for each in simulation.records)

    busy = asked(300, 40.0)
    late = play("routers: {count: 2, each: [{feed: 0.001}, {feed: 3.0}]}", busy, blocks=90)
    assert wrong(late) > wrong(play("routers: {count: 2}", busy, blocks=90))


def test_a_restarted_router_loses_its_requests_and_learns_the_caches_anew() -> None:
    simulation = play("routers: {count: 2}\nevents: [{at: 8.02, type: restart_router, router: 1, downFor: 2}]")
    lost = [each for each in simulation.records if each.error is not None]
    assert lost
    assert {each.error for each in lost} == {ErrorCause.CONNECTION}
    assert all(each.sent < 8.02 and each.index % 2 == 1 for each in lost)
    for number in range(4):
        assert simulation.fleets[1].held_blocks(f"http://worker-{number}") == held(simulation, number)


def test_no_router_is_a_refused_connection() -> None:
    simulation = play("events: [{at: 5.01, type: restart_router, router: 0, downFor: 2}]")
    assert errors(simulation)[ErrorCause.CONNECTION, "ClientConnectorError"] == 20


def test_requests_are_dealt_at_random_by_seed() -> None:
    runs = [play(f"routers: {{count: 2, dealing: random, seed: {seed}}}").records for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_cut_feed_leaves_requests_routed_and_is_made_up_for() -> None:
    simulation = play("events: [{at: 5, type: cut_feed, worker: worker-1, seconds: 4}]")
    assert errors(simulation) == {}
    assert sent_to(simulation, "worker-1", 5.5, 9.0), "it is alive: its /health answers"
    assert simulation.fleets[0].held_blocks("http://worker-1") == held(simulation, 1)


def held(simulation: Simulation, number: int) -> dict[bytes, int]:
    counted: dict[bytes, int] = {}
    for key, _ in simulation.workers[number].engine.blocks():
        counted[key] = counted.get(key, 0) + 1
    return counted


# --- requests that no worker takes ---


def test_a_prompt_that_is_too_long_is_an_error_of_its_request() -> None:
    def of(index: int, length: int, max_tokens: int = 24) -> Prompt:
        tokens = token_ids(f"long {index}", length)
        return Prompt(completion(index, index * 0.1, tokens, max_tokens), tokens, DEFAULT_SCOPE)

    simulation = play("{}", (of(0, 4097), of(1, 4096), of(2, 4095), of(3, 100, 5000), of(4, 4000, 4096), of(5, 50)))
    records = sorted(simulation.records, key=lambda record: record.index)
    words = "HTTP 400 BadRequestError"
    too_long, no_room, answered = (ErrorCause.PROMPT_TOO_LONG, words), (ErrorCause.INVALID, words), (None, "")
    assert [(each.error, each.detail) for each in records] == [
        too_long, no_room, answered, too_long, answered, answered,
    ]  # fmt: skip
    assert [each.output_tokens for each in records] == [None, None, 1, None, 96, 24]
    result = summarise(records, RunInfo("cache_aware", 0, {}))
    assert result.errors == 3
    assert sum(result.error_causes.values()) == 3


def test_refusals_in_a_row_are_doubted_and_agreed_upon() -> None:
    """The fourth in a row is asked of a second worker, as in a live router, and the client gets the refusal."""
    long = token_ids("long", 5000)
    prompts = tuple(Prompt(completion(index, index * 0.1, long, 8), long, DEFAULT_SCOPE) for index in range(40))
    simulation = play("{}", prompts, workers=2)
    assert errors(simulation) == {(ErrorCause.PROMPT_TOO_LONG, "HTTP 400 BadRequestError"): 40}


# --- anything at all ---

NAMES = st.integers(0, 3).map(lambda number: f"worker-{number}")
TIMES = st.floats(0, 6).map(lambda value: round(value, 2))
EVENTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("kill"), "at": TIMES, "worker": NAMES, "restartAfter": st.none() | TIMES}),
    st.fixed_dictionaries({"type": st.just("freeze"), "at": TIMES, "worker": NAMES, "seconds": TIMES}),
    st.fixed_dictionaries({"type": st.just("freeze"), "at": TIMES, "worker": NAMES, "seconds": st.just(70.0)}),
    st.fixed_dictionaries(
        {"type": st.just("slow"), "at": TIMES, "worker": NAMES, "seconds": TIMES, "speed": st.sampled_from([0.1, 3.0])}
    ),
    st.fixed_dictionaries({"type": st.just("join"), "at": TIMES}),
    st.fixed_dictionaries({"type": st.just("leave"), "at": TIMES, "grace": TIMES}),
    st.fixed_dictionaries({"type": st.just("leave"), "at": TIMES, "worker": NAMES}),
    st.fixed_dictionaries(
        {"type": st.just("restart_router"), "at": TIMES, "router": st.integers(0, 1), "downFor": TIMES}
    ),
    st.fixed_dictionaries({"type": st.just("cut_feed"), "at": TIMES, "seconds": TIMES}),
)


@settings(max_examples=15, deadline=None)
@given(events=st.lists(EVENTS, max_size=6), streamed=st.sampled_from([0.0, 0.5, 1.0]))
def test_every_request_ends_once_whatever_happens(events: list[dict[str, object]], streamed: float) -> None:
    scenario = Scenario.model_validate({"routers": {"count": 2}, "events": events})
    prompts = asked(60, 12.0)
    runs = []
    for _ in range(2):
        simulation = Simulation(shape(), "cache_aware", streamed=streamed, scenario=scenario)
        runs.append(simulation.run(prompts, lambda sent, answered, failed: None))
        assert [record.index for record in runs[-1]] == list(range(60))
        for record in runs[-1]:
            assert (record.error is None) == (record.output_tokens == 24)
            assert record.error is not None or record.sent < record.first_token <= record.finished
    assert runs[0] == runs[1], "a simulation repeats exactly"
    for fleet in simulation.fleets:
        assert all(status.in_flight == 0 for status in fleet.workers(1e6))
        assert fleet.assumed_blocks == 0 or fleet.expire(1e6) is not None
    for worker in simulation.workers:
        if worker.serving:
            assert worker.idle
            assert worker.engine.load().running == worker.engine.load().waiting == 0


# --- the files ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("events: [{at: 1, type: kill}]", "events.0.kill.worker: Field required", id="a field missing"),
        pytest.param("events: [{at: -1, type: join}]", "events.0.join.at: Input should be greater", id="a time"),
        pytest.param("events: [{at: 1, type: explode}]", "events.0: Input tag 'explode'", id="an unknown type"),
        pytest.param("routers: {count: 1, each: [{}, {}]}", "delays for 2 routers, but count is 1", id="routers"),
        pytest.param("router: 3", "router: Extra inputs", id="an unknown field"),
        pytest.param("events: [", "scenario.yaml, line 1: it is not YAML", id="no YAML"),
        pytest.param("- 1", "the scenario: Input should be a valid dictionary", id="a list"),
        pytest.param("workers: [{name: a, profile: gpu}]", "group a: unknown profile 'gpu'", id="a profile"),
        pytest.param("workers: [{name: a}, {name: a}]", "two groups have the same name", id="two groups"),
        pytest.param("events: [{at: 1, type: kill, worker: worker-4}]", "there is no worker-4", id="a worker"),
        pytest.param("events: [{at: 1, type: join, group: b}]", "there is no group 'b'", id="a group"),
        pytest.param("events: [{at: 1, type: restart_router, router: 1}]", "there is no router 1", id="a router"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_said(text: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=said.replace("[", r"\[")):
        play(text, asked(1))


def test_a_worker_that_joined_before_may_be_named() -> None:
    play("events: [{at: 2, type: kill, worker: worker-4}, {at: 1, type: join}]", asked(30))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_run(file: Path) -> None:
    scenario = read_scenario(file)
    simulation = Simulation(scenario.extend(shape()), "cache_aware", scenario=scenario)
    records = simulation.run(asked(120, 4.0), lambda sent, answered, failed: None)
    assert len(records) == 120


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"cannot read the scenario .*none\.yaml"):
        read_scenario(tmp_path / "none.yaml")


def test_the_defaults_are_those_of_a_router() -> None:
    real, played = Settings(), SimulatedRouter(0, VirtualClock(), FLEET, Delays(), lambda: False)
    assert (real.stall_timeout, real.cut_timeout) == (STALL_TIMEOUT, CUT_TIMEOUT)
    assert (real.retry_share, real.retry_floor) == (RETRY_SHARE, RETRY_FLOOR)
    assert (played.policy.attempts, played.policy.deadline) == (real.retry_attempts, real.retry_deadline)
    assert FeedPolicy().reconnect == RECONNECT
    assert (FLEET.liveness_timeout, FLEET.view_timeout) == (real.liveness_timeout, real.view_timeout)
    policy = FLEET.outliers
    assert (policy.consecutive, policy.rate_gap, policy.first_seconds, policy.longest_seconds, policy.share) == (
        real.eject_after, real.eject_rate_gap, real.eject_seconds, real.eject_longest, real.eject_share,
    )  # fmt: skip
