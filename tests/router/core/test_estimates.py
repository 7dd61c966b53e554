"""What the fleet assumes about requests that it sent, and what it expects of workers.

Not covered: what answers teach about the speed of engines (test_latency_samples.py).
"""

from __future__ import annotations

import random

import pytest

from kvcache.feed import Batch, Load, Removed, Stored
from kvcache.profiles import PROFILES
from router.core.decision import DecisionReason
from router.core.fleet import Ticket
from tests.router.core.support import (
    BLOCK,
    LATENCY,
    MakeFleet,
    ask,
    hold,
    idle,
    info,
    keys_of,
    send,
    snapshot,
    tokens,
    url_of,
)

# --- what is assumed of dispatched requests ---------------------------------------------------------------------


def test_a_dispatched_prompt_counts_as_present_until_it_is_given_up(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    decision, ticket = send(fleet, ask(tokens(12)), 0.0)
    follower = fleet.choose(ask(tokens(15)), 0.0, [u for u in map(url_of, range(2)) if u != decision.url])
    assert follower.matched_blocks == 12
    ticket.release(0.1, reused=False)
    assert fleet.assumed_blocks == 0
    assert fleet.choose(ask(tokens(15)), 0.1).reason is DecisionReason.NO_MATCH


def test_what_the_feed_does_not_confirm_is_forgotten_after_the_grace(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, speculation_grace=1.0)
    decision, ticket = send(fleet, ask(tokens(12)), 0.0)
    ticket.first_token(7.0)
    ticket.release(7.5)
    assert fleet.choose(ask(tokens(12)), 7.9).matched_blocks == 12
    number = int(decision.worker_id[1:])
    fleet.apply_snapshot(decision.url, snapshot(info(f"w{number}"), 1, keys_of(tokens(12))[:6]), 7.9)
    after = fleet.choose(ask(tokens(12)), 8.0)
    assert (after.matched_blocks, fleet.assumed_blocks) == (6, 0)


def test_what_the_worker_has_evicted_is_not_assumed_any_more(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, speculation_grace=1.0)
    keys = keys_of(tokens(12))
    decision, ticket = send(fleet, ask(tokens(12)), 0.0)
    ticket.first_token(0.1)
    fleet.apply_batch(decision.url, Batch(1, 1, (Stored(None, tuple(keys)),), idle()), 0.1)
    fleet.apply_batch(decision.url, Batch(1, 2, (Removed(tuple(keys[8:])),), idle()), 0.2)
    assert fleet.choose(ask(tokens(12)), 0.2).matched_blocks == 8
    ticket.release(0.3)
    assert fleet.choose(ask(tokens(12)), 9.0).matched_blocks == 8


def test_a_request_without_a_first_byte_gets_the_grace_from_its_release(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    _, ticket = send(fleet, ask(tokens(3), streaming=False), 0.0)
    ticket.release(9.0)
    ticket.release(99.0, reused=False)
    fleet.expire(9.9)
    assert fleet.assumed_blocks == 3
    fleet.expire(10.0)
    assert fleet.assumed_blocks == 0


def test_a_cleared_cache_takes_its_assumptions_along(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    _, ticket = send(fleet, ask(tokens(3)), 0.0)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0", epoch=2)), 0.1)
    assert fleet.assumed_blocks == 0
    _, again = send(fleet, ask(tokens(3)), 0.1)
    ticket.release(0.2, reused=False)
    assert fleet.assumed_blocks == 3, "a ticket of the old incarnation must not end what the new one is assumed to hold"
    again.release(0.3, reused=False)
    assert fleet.assumed_blocks == 0


def test_dispatching_always_releases(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    request = ask(tokens(3))
    with pytest.raises(RuntimeError), fleet.dispatching(fleet.choose(request, 0.0), request, lambda: 0.0):
        raise RuntimeError("the connection broke")
    assert (fleet.workers(0.0)[0].in_flight, fleet.assumed_blocks) == (0, 0)
    with fleet.dispatching(fleet.choose(request, 0.0), request, lambda: 0.0) as ticket:
        ticket.first_token(0.0)
    assert (fleet.workers(0.0)[0].in_flight, fleet.assumed_blocks) == (0, 3)


# --- the estimate -------------------------------------------------------------------------------------------------


def test_others_work_that_a_report_tells_of_counts_and_fades(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    busy = Load(running=1, waiting=1, prefill_tokens=100 * BLOCK, free_blocks=100, total_blocks=100)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 1, load=busy), 0.0)
    first, second = fleet.choose(ask(tokens(2)), 0.0).candidates
    assert first.queue_seconds == pytest.approx(0.0075 + 0.005 + 0.25)
    assert first.in_flight == 2
    assert second.queue_seconds == 0
    assert fleet.choose(ask(tokens(2)), 0.2).candidates[0].queue_seconds == pytest.approx(0.0075 + 0.055)
    assert fleet.choose(ask(tokens(2)), 0.9).candidates[0].queue_seconds == pytest.approx(0.0075)


def test_own_requests_in_a_report_are_not_counted_twice(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    tickets = [send(fleet, ask(tokens(40, start=1000 * n)), 0.0)[1] for n in range(3)]
    before = fleet.workers(0.0)[0].queue_seconds
    busy = Load(running=3, prefill_tokens=3 * 41 * BLOCK, free_blocks=CAPACITY_LEFT, total_blocks=10_000)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 1, load=busy), 0.0)
    assert fleet.workers(0.0)[0].queue_seconds == pytest.approx(before)
    for ticket in tickets:
        ticket.first_token(0.1)
        ticket.release(0.1)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 2, load=busy), 0.1)
    assert fleet.choose(ask(tokens(1)), 0.1).candidates[0].in_flight == 0, "that report was under way when they ended"


CAPACITY_LEFT = 10_000 - 3 * 41


def test_a_prefill_beside_decoding_takes_a_decode_step_at_least(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    first, ticket = send(fleet, ask(tokens(2)), 0.0)
    ticket.first_token(first.predicted_ttft)
    decision = fleet.choose(ask(tokens(2, start=500)), 0.1)
    assert decision.queue_seconds == pytest.approx(LATENCY.decode / 2)
    assert decision.prefill_seconds == LATENCY.decode


def test_a_worker_whose_memory_is_taken_makes_a_newcomer_wait(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    for number in range(2):
        fleet.apply_snapshot(url_of(number), snapshot(info(f"w{number}", capacity=50), 1, load=idle(50)), 0.0)
    for turn in range(2):
        send(fleet, ask(tokens(39, start=1000 * turn)), 0.0)[1].first_token(0.1)
    small, large = fleet.choose(ask(tokens(5)), 1.0), fleet.choose(ask(tokens(30, start=7000)), 1.0)
    assert small.candidates[0].memory_seconds == 0
    assert large.candidates[0].memory_seconds > 0
    assert large.queue_seconds >= large.candidates[0].memory_seconds


def test_a_report_shows_that_requests_share_their_blocks(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, tokens(40), 40)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 2, keys_of(tokens(40)), idle(50)), 0.0)
    tickets = [send(fleet, ask([*tokens(40), n]), 0.0)[1] for n in range(8)]
    assert fleet.choose(ask(tokens(40)), 0.0).candidates[0].memory_seconds == 0
    for ticket in tickets:
        ticket.release(1.0)


def test_a_slower_engine_than_the_profile_says_is_learnt_from_first_tokens(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, view_timeout=10_000.0)

    def serve(turn: int, requests: int, seconds: float) -> None:
        now = 10.0 * turn
        asked = [ask(tokens(60, start=10_000 * turn + 500 * n)) for n in range(requests)]
        tickets = [send(fleet, request, now)[1] for request in asked]
        for ticket in tickets:
            ticket.first_token(now + seconds)
            ticket.release(now + 9)

    prefill = LATENCY.prefill(61)
    for turn in range(100):
        serve(turn, 1, 3.0 * prefill)
    assert fleet.workers(1000.0)[0].latency_factor == pytest.approx(3.0, rel=0.1)
    for turn in range(100, 140):  # together they take as long as both alone
        serve(turn, 2, 2 * 3.0 * prefill)
    assert fleet.workers(1400.0)[0].latency_factor == pytest.approx(3.0, rel=0.1)
    for turn in range(140, 160):  # others' requests are there: what ours see is not the engine's speed
        load = Load(running=5, prefill_tokens=500, free_blocks=10, total_blocks=10)
        fleet.apply_batch(url_of(0), Batch(1, 0, (), load), 10.0 * turn)
        serve(turn, 1, 9.0)
    assert fleet.workers(1600.0)[0].latency_factor == pytest.approx(3.0, rel=0.1)


def test_nothing_is_left_after_many_requests_that_end_in_every_way(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, latency=PROFILES["llama-3.1-8b-h100-80gb"].latency)
    rng = random.Random(3)
    tickets: list[Ticket] = []
    now = 0.0
    for _ in range(3000):
        now += rng.random() * 0.02
        for number in range(4):
            fleet.mark_alive(url_of(number), now)
        start = 1000 * rng.randrange(12)
        tickets.append(send(fleet, ask(tokens(rng.randrange(30), start), streaming=rng.random() < 0.7), now)[1])
        rng.shuffle(tickets)
        while len(tickets) > 40:
            ticket = tickets.pop()
            if rng.random() < 0.6:
                ticket.first_token(now)
            ticket.release(now, reused=rng.random() < 0.8)
    for ticket in tickets:
        ticket.release(now)
    fleet.expire(now + 1.01)
    assert fleet.assumed_blocks == 0
    for worker in fleet.workers(now + 1.01):
        assert (worker.in_flight, worker.queue_seconds) == (0, 0.0)
