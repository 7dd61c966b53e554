"""What decoding adds to the cost of a request: how long its answer will be, and whom it will slow down there.

Not covered: whether whole workloads profit (tests/bench/test_decoding.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import HeldElsewhere, Load, Tier
from kvcache.profiles import LatencyModel
from router.core.decision import DecisionReason, RouteRequest
from router.core.fleet import Fleet
from router.core.latency_samples import Usage
from router.core.lengths import REMEMBERED, AnswerLengths, kind_of
from router.core.strategies import STRATEGIES
from router.core.work import LEFT, STALL_TOKENS
from router.server.affinity import affine, with_headers
from tests.router.core.support import (
    BLOCK,
    MakeFleet,
    ask,
    config,
    hold,
    info,
    keys_of,
    send,
    snapshot,
    tokens,
    url_of,
)

LATENCY = LatencyModel(0.005, 0.0025, 0.0005, 0.015, decode_sequence=0.0002, decode_token=1e-6)


def long_answer(prompt: list[int], expected: int) -> RouteRequest:
    return replace(ask(prompt, output=100_000), output_hint=expected)


def decoding(fleet: Fleet, *requests: tuple[int, int]) -> None:
    """Worker 0 decodes one request for each (blocks of the prompt, expected tokens of the answer)."""
    for number, (blocks, expected) in enumerate(requests):
        request = long_answer(tokens(blocks, start=5000 * (number + 1)), expected)
        decision = fleet.choose(request, 0.0, exclude=[url_of(1)])
        fleet.dispatch(decision, request, 0.0).first_token(decision.predicted_ttft)


def test_the_slowdown_is_what_each_pair_that_decodes_together_costs_each_other(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, latency=LATENCY)
    there = [(10, 400), (60, 200), (3, 900)]
    decoding(fleet, *there)
    busy, idle = fleet.choose(long_answer(tokens(25), 300), 2.0).candidates
    own = 25 * BLOCK + 1 + 300 // 2
    steps = min(300, LEFT * (400 + 200 + 900) / 3)
    lost = 0.0
    for blocks, expected in there:
        lost += steps * (0.0002 + 1e-6 * (blocks * BLOCK + 1 + expected // 2))  # what it costs the request
        lost += steps * (0.0002 + 1e-6 * own)  # what the request costs it
    factor = fleet.workers(2.0)[0].decode_factor
    step = (0.015 + 3 * 0.0002 + 1e-6 * sum(blocks * BLOCK + 1 + expected // 2 for blocks, expected in there)) * factor
    stalls = sum((busy.prefill_seconds - step) * STALL_TOKENS / expected for _, expected in there)
    assert busy.slowdown_seconds == pytest.approx(lost * factor + stalls)
    assert idle.slowdown_seconds == 0.0
    assert idle.decode_seconds == pytest.approx(
        300 * (0.015 + 0.0002 + 1e-6 * own) * fleet.workers(2.0)[1].decode_factor
    )
    for each in (busy, idle):
        assert each.cost == pytest.approx(each.queue_seconds + each.prefill_seconds + each.slowdown_seconds)


def test_long_answers_behind_one_prompt_spread_and_short_ones_stay(make_fleet: MakeFleet) -> None:
    """Two requests are being answered where the system prompt is. It is worth computing again for a long answer."""
    shared = tokens(60)
    for expected, reason in ((1, DecisionReason.PREFIX_MATCH), (2000, DecisionReason.LOAD_OVER_PREFIX)):
        fleet = make_fleet(2, latency=LATENCY)
        decoding(fleet, (60, 2000), (60, 2000))
        hold(fleet, 0, shared, 60)
        assert fleet.choose(long_answer(shared, expected), 1.0).reason is reason


def test_a_long_prompt_goes_where_it_stops_the_longer_answer(make_fleet: MakeFleet) -> None:
    """All is equal but the lengths of the answers in progress, and decoding together costs nothing."""
    fleet = make_fleet(2, latency=replace(LATENCY, decode_sequence=0.0, decode_token=0.0))
    for number, expected in enumerate((8, 800)):
        request = long_answer(tokens(9, start=7000 * (number + 1)), expected)
        decision = fleet.choose(request, 0.0, exclude=[url_of(1 - number)])
        fleet.dispatch(decision, request, 0.0).first_token(decision.predicted_ttft)
    decision = fleet.choose(long_answer(tokens(400), 100), 0.1)
    short, long = decision.candidates
    assert decision.url == url_of(1)
    assert short.slowdown_seconds == pytest.approx(100 * long.slowdown_seconds)


@pytest.mark.parametrize(
    ("there", "blocks"),
    [pytest.param(1, 30, id="an answer of one token"), pytest.param(40, 1, id="a prefill within a decode step")],
)
def test_what_makes_nobody_wait_is_no_stall(make_fleet: MakeFleet, there: int, blocks: int) -> None:
    fleet = make_fleet(2, latency=replace(LATENCY, decode_sequence=0.0, decode_token=0.0))
    decoding(fleet, (5, there))
    assert fleet.choose(long_answer(tokens(blocks), 100), 0.1).candidates[0].slowdown_seconds == 0.0


def test_requests_of_other_routers_slow_down_too(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, latency=LATENCY)
    load = Load(running=8, free_blocks=1000 - 8 * 50, total_blocks=1000)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 1, load=load), 0.0)
    busy, idle = fleet.choose(long_answer(tokens(25), 50), 0.0).candidates
    own = 25 * BLOCK + 1 + 25
    lost = 50 * (8 * 0.0002 + 1e-6 * 8 * 50 * BLOCK + 8 * (0.0002 + 1e-6 * own))
    step = 0.015 + 8 * 0.0002 + 1e-6 * 8 * 50 * BLOCK
    stalls = 8 * (busy.prefill_seconds - step) * STALL_TOKENS / 128
    assert busy.slowdown_seconds == pytest.approx(lost + stalls)
    assert idle.slowdown_seconds == 0.0


def test_nothing_of_an_answer_is_left_in_the_cost_once_it_is_over(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, latency=LATENCY)
    request = long_answer(tokens(25), 700)
    tickets = [send(fleet, request, 0.0)[1] for _ in range(5)]
    for number, ticket in enumerate(tickets):
        if number % 2:
            ticket.first_token(0.5)
        ticket.release(1.0)
    assert [candidate.slowdown_seconds for candidate in fleet.choose(request, 1.0).candidates] == [0.0, 0.0]


# --- how long an answer will be -----------------------------------------------------------------------------------


def expected_tokens(fleet: Fleet, request: RouteRequest) -> float:
    """From the time that the answer is expected to take on an idle worker, whose steps all take 15 ms."""
    return fleet.choose(request, 0.0).candidates[0].decode_seconds / 0.015


def test_the_length_is_the_hint_else_what_such_requests_had_so_far_and_never_above_the_limit(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(1, expected_output_tokens=128)

    def finish(request: RouteRequest, length: int) -> None:
        _, ticket = send(fleet, request, 0.0)
        ticket.finished(0.0, Usage(9, length, 0))
        ticket.release(0.0)

    open_end = replace(ask(tokens(2)), output_tokens=None)
    assert expected_tokens(fleet, open_end) == pytest.approx(128)
    assert expected_tokens(fleet, ask(tokens(2), output=100)) == pytest.approx(100)
    assert expected_tokens(fleet, replace(open_end, output_hint=900)) == pytest.approx(900)
    assert expected_tokens(fleet, replace(ask(tokens(2), output=100), output_hint=900)) == pytest.approx(100)
    for _ in range(60):
        finish(ask(tokens(2), output=600), 590)
        finish(ask(tokens(2), output=4000), 20)
        finish(ask(tokens(2), output=4000, model="adapter"), 1500)
    assert expected_tokens(fleet, ask(tokens(2), output=700)) == pytest.approx(590, rel=0.05)
    assert expected_tokens(fleet, ask(tokens(2), output=550)) == pytest.approx(550)
    assert expected_tokens(fleet, ask(tokens(2), output=4000)) == pytest.approx(20, rel=0.3)
    assert expected_tokens(fleet, ask(tokens(2), output=4000, model="adapter")) == pytest.approx(1500, rel=0.05)


def test_the_lengths_of_the_latest_kinds_of_requests_are_remembered() -> None:
    lengths = AnswerLengths(100.0)
    first, *others = (kind_of(f"adapter-{number}", 4096) for number in range(REMEMBERED + 1))
    lengths.observe(first, 3000)
    assert lengths.expect(first, 4096, None) > 1000
    for kind in others:
        lengths.observe(kind, 10)
    assert lengths.expect(first, 4096, None) == pytest.approx(lengths.mean) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "headers", "hint"),
    [
        pytest.param({"nvext": {"agent_hints": {"osl": 700}}}, [], 700, id="body"),
        pytest.param({}, [(b"x-kvcluster-output-tokens", b"700")], 700, id="header"),
        pytest.param(
            {"nvext": {"agent_hints": {"osl": 9}}},
            [(b"x-kvcluster-output-tokens", b"700")],
            700,
            id="header before body",
        ),
        pytest.param({"nvext": {"agent_hints": {"osl": True}}}, [], None, id="no number"),
        pytest.param({"nvext": {"agent_hints": {"osl": -5}}}, [], None, id="negative"),
        pytest.param({"nvext": ["agent_hints"]}, [], None, id="no object"),
        pytest.param({}, [(b"x-kvcluster-output-tokens", b"many")], None, id="header without a number"),
        pytest.param({}, [(b"x-kvcluster-output-tokens", b"0")], None, id="header of 0"),
        pytest.param({}, [(b"x-kvcluster-output-tokens", b"9" * 400)], 999_999_999, id="absurd header"),
    ],
)
def test_a_client_states_the_length_that_it_expects(
    fields: dict[str, object], headers: list[tuple[bytes, bytes]], hint: int | None
) -> None:
    route = with_headers(affine(ask(tokens(2)), "/v1/chat/completions", fields), headers)
    assert route.output_hint == hint


length = st.none() | st.sampled_from([1, 300, 2**53, 10**400])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.lists(st.tuples(st.integers(1, 400), length, length, st.booleans(), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([0, 1, 50, 10**9]),
    st.sampled_from([0.0, 1e-5, 5.0]),
    st.integers(0, 40),
)
def test_no_request_makes_a_cost_negative_or_undefined(
    strategy: str,
    requests: list[tuple[int, int | None, int | None, bool, bool]],
    capacity: int,
    tier_seconds: float,
    foreign: int,
) -> None:
    fleet = Fleet(config(strategy=strategy, latency=LATENCY))
    for number in range(2):
        fleet.add(url_of(number))
        state = snapshot(
            info(f"w{number}", tier_seconds={Tier.CPU: tier_seconds}), load=Load(foreign, 3, 9, 0, capacity)
        )
        below = HeldElsewhere(Tier.CPU, 0, tuple(keys_of(tokens(300))[number:]))
        fleet.apply_snapshot(url_of(number), replace(state, elsewhere=(below,)), 0.0)
    now = 0.0
    for blocks, most, hint, streaming, answered in requests:
        request = replace(ask(tokens(blocks), streaming=streaming), output_tokens=most, output_hint=hint)
        decision = fleet.choose(request, now)
        for each in decision.candidates:
            seconds = (each.queue_seconds, each.load_seconds, each.memory_seconds, each.prefill_seconds)
            seconds += (each.decode_seconds, each.slowdown_seconds, each.cost)
            assert all(0.0 <= value < math.inf for value in seconds)
            assert each.memory_seconds <= each.queue_seconds
            assert each.active_blocks >= 0
        ticket = fleet.dispatch(decision, request, now)
        now += 0.01
        if answered:
            ticket.first_token(now)
            ticket.release(now)
