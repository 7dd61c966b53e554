"""Which worker a request goes to and why, under each strategy.

Not covered: how the figures that strategies compare come about (test_estimates.py, test_latency_samples.py), and which
workers are candidates (test_worker_state.py).
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvcache.feed import Load
from kvcache.keys import CacheScope, PrefixKeys, pack_tokens
from router.core.decision import DecisionReason, RouteRequest
from router.core.fleet import Fleet, Ticket
from router.core.strategies import STRATEGIES, UnknownStrategyError, find_strategy
from router.core.worker_state import Intake
from tests.router.core.support import (
    BLOCK,
    LATENCY,
    MakeFleet,
    ask,
    config,
    hold,
    info,
    send,
    snapshot,
    tokens,
    url_of,
)

# --- cache_aware --------------------------------------------------------------------------------------------


def test_the_worker_that_holds_most_of_the_prompt_gets_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    prompt = tokens(20)
    hold(fleet, 1, prompt, 12)
    hold(fleet, 2, prompt, 5)
    decision = fleet.choose(ask(prompt), 0.0)
    assert (decision.worker_id, decision.reason, decision.matched_blocks) == ("w1", DecisionReason.PREFIX_MATCH, 12)
    assert decision.prompt_blocks == 21, "the last one is partial"
    assert decision.queue_seconds == 0
    assert decision.predicted_ttft == pytest.approx(0.005 + 0.0025 * 9)
    assert [(c.worker_id, c.matched_blocks) for c in decision.candidates] == [("w0", 0), ("w1", 12), ("w2", 5)]
    assert decision.candidates[0].cost > decision.candidates[2].cost > decision.candidates[1].cost


def test_a_prompt_that_is_all_cached_costs_the_cached_prefill(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    prompt = tokens(8)[: 8 * BLOCK]  # ends with a full block, whose last token is recomputed
    hold(fleet, 1, prompt, 8)
    decision = fleet.choose(ask(prompt), 0.0)
    assert decision.matched_blocks == 7
    assert decision.predicted_ttft == LATENCY.prefill_cached


def test_a_long_queue_outweighs_a_match(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    shared = tokens(10)
    hold(fleet, 0, shared, 10)
    send(fleet, ask(tokens(400, start=10_000)), 0.0)  # goes to either: make sure it is w0
    busy = fleet.workers(0.0)[0].in_flight
    if not busy:
        send(fleet, ask(tokens(400, start=20_000)), 0.0)
    decision = fleet.choose(ask(shared), 0.0)
    assert (decision.worker_id, decision.reason) == ("w1", DecisionReason.LOAD_OVER_PREFIX)
    assert decision.matched_blocks == 0
    assert fleet.choose(ask(shared), 1.0).reason is DecisionReason.PREFIX_MATCH, "the queue is nearly through by then"


def test_a_burst_in_one_instant_spreads(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    chosen = Counter(send(fleet, ask(tokens(20, start=1000 * n)), 5.0)[0].worker_id for n in range(16))
    assert chosen == {"w0": 4, "w1": 4, "w2": 4, "w3": 4}


def test_a_burst_of_equal_prompts_uses_what_the_first_one_will_have_cached(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    decisions = [send(fleet, ask(tokens(40)), 5.0)[0] for _ in range(16)]
    assert decisions[0].reason is DecisionReason.NO_MATCH
    assert sum(decision.matched_blocks for decision in decisions) >= 12 * 40, "each worker computes it once at most"
    assert max(decision.predicted_ttft for decision in decisions) < 4 * LATENCY.prefill(41)


def test_an_idle_fleet_fills_its_caches_evenly(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    rng = random.Random(7)
    work: Counter[str] = Counter()
    for turn in range(200):
        blocks = rng.randrange(1, 60)
        decision, ticket = send(fleet, ask(tokens(blocks, start=1000 * turn)), float(turn))
        work[decision.worker_id] += blocks
        ticket.first_token(turn + 0.2)
        ticket.release(turn + 0.3)
    assert max(work.values()) < 1.1 * work.total() / 4


TRAP = {"longest_prefix": 8.0, "cache_aware": 1.35}
"""Largest over mean share of the work among eight workers, at most."""


@pytest.mark.parametrize("strategy", TRAP)
def test_prompts_that_all_share_their_first_block(make_fleet: MakeFleet, strategy: str) -> None:
    """The trap of plain longest-prefix matching: nearly all prompts share a first block, so whoever has served one is
    the longest match for all of the rest. It takes everything; weighing the match against the queue does not."""
    fleet = make_fleet(8, strategy=strategy)
    served: Counter[str] = Counter()
    open_tickets: list[tuple[float, Ticket]] = []
    for turn in range(400):
        now = 0.02 * turn
        while open_tickets and open_tickets[0][0] <= now:
            done, ticket = open_tickets.pop(0)
            ticket.first_token(done)
            ticket.release(done)
        prompt = [*range(BLOCK), *tokens(40, start=1000 * (turn + 1))]
        decision, ticket = send(fleet, ask(prompt), now)
        served[decision.worker_id] += 1
        fleet.mark_alive(decision.url, now)
        open_tickets.append((now + decision.predicted_ttft, ticket))
        open_tickets.sort(key=lambda entry: entry[0])
    assert max(served.values()) / (400 / 8) <= TRAP[strategy]
    if strategy == "longest_prefix":
        assert list(served.values()) == [400]


def test_a_hot_prefix_is_copied_once_its_holder_is_swamped(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    hot = tokens(80)
    workers = {send(fleet, ask([*hot, *tokens(4, start=1000 * (n + 1))]), 0.001 * n)[0].worker_id for n in range(300)}
    assert len(workers) == 4


def test_one_conversations_history_is_waited_for_longer_than_computed_again(make_fleet: MakeFleet) -> None:
    """Waiting 0.2 s or computing 0.15 s again: the answer comes sooner by computing, at the next request's expense."""
    fleet = make_fleet(2)
    history = tokens(60)
    hold(fleet, 0, history, 60)
    fleet.set_intake(url_of(1), Intake.CLOSED)
    send(fleet, ask(tokens(78, start=10_000)), 0.0)
    fleet.set_intake(url_of(1), Intake.OPEN)
    decision = fleet.choose(ask(history), 0.0)
    assert decision.candidates[0].queue_seconds > decision.candidates[1].prefill_seconds
    assert (decision.worker_id, decision.reason) == ("w0", DecisionReason.PREFIX_MATCH)


def test_a_popular_prefix_is_copied_as_soon_as_that_is_sooner(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    shared = tokens(60)
    hold(fleet, 0, shared, 60)
    for turn in range(4):
        send(fleet, ask(shared), 0.1 * turn)[1].release(0.1 * turn)
    fleet.set_intake(url_of(1), Intake.CLOSED)
    send(fleet, ask(tokens(78, start=10_000)), 1.0)
    fleet.set_intake(url_of(1), Intake.OPEN)
    decision = fleet.choose(ask(shared), 1.0)
    assert (decision.worker_id, decision.reason) == ("w1", DecisionReason.LOAD_OVER_PREFIX)


def test_a_prefix_that_many_ask_for_is_copied_to_a_worker_that_is_idle(make_fleet: MakeFleet) -> None:
    """Nobody waits at its holders, but one of three workers would get nothing."""
    fleet = make_fleet(3)
    shared = tokens(60)
    for number in range(2):
        hold(fleet, number, shared, 60)
    served = Counter[str]()
    for turn in range(120):
        now = 0.05 * turn
        for number in range(3):
            fleet.mark_alive(url_of(number), now)
        decision, ticket = send(fleet, ask([*shared, turn]), now)
        ticket.first_token(now)
        ticket.release(now + 0.01)
        served[decision.worker_id] += 1
    assert served.keys() == {"w0", "w1", "w2"}


def test_prefixes_that_are_popular_beside_others_are_not_copied_everywhere(make_fleet: MakeFleet) -> None:
    """Eight documents, four workers: each is asked for often, but no more often than one worker can answer."""
    fleet = make_fleet(4)
    for turn in range(320):
        now = 0.02 * turn
        for number in range(4):
            fleet.mark_alive(url_of(number), now)
        _, ticket = send(fleet, ask([*tokens(60, start=1000 * (turn % 8)), turn]), now)
        ticket.first_token(now)
        ticket.release(now + 0.01)
    copies = fleet.choose(ask(tokens(60)), 6.4).candidates
    assert sum(candidate.matched_blocks > 0 for candidate in copies) == 1


# --- lmetric and linear ------------------------------------------------------------------------------------------


def busy_and_idle(make_fleet: MakeFleet, strategy: str, held: int, answers: int) -> str:
    """Worker 0 holds `held` of the prompt's 40 blocks and decodes `answers` requests of 20 blocks."""
    fleet = make_fleet(2, strategy=strategy)
    hold(fleet, 0, tokens(40), held)
    for number in range(answers):
        request = ask(tokens(20, start=5000 * (number + 1)))
        fleet.dispatch(fleet.choose(request, 0.0, [url_of(1)]), request, 0.0).first_token(0.0)
    decision = fleet.choose(ask(tokens(40)), 0.0)
    assert decision.reason == strategy
    return decision.worker_id


@pytest.mark.parametrize(
    ("strategy", "held", "answers", "worker"),
    [
        ("lmetric", 40, 3, "w0"),  # (7.5 + 15 ms) x 4 against 107.5 ms x 1
        ("lmetric", 40, 4, "w1"),  # (7.5 + 15 ms) x 5
        ("lmetric", 20, 0, "w0"),  # 57.5 ms against 107.5 ms
        ("linear", 40, 2, "w0"),  # 9 + 2 x 21 + 1 blocks against 43 + 41
        ("linear", 40, 4, "w1"),  # 9 + 4 x 21 + 1
        ("linear", 20, 0, "w0"),  # 23 + 21 against 43 + 41
    ],
)
def test_the_baselines_weigh_prefill_and_load_by_their_own_rules(
    make_fleet: MakeFleet, strategy: str, held: int, answers: int, worker: str
) -> None:
    assert busy_and_idle(make_fleet, strategy, held, answers) == worker


# --- reasons --------------------------------------------------------------------------------------------------


def test_a_lone_candidate_is_named_so_and_its_match_told(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    hold(fleet, 0, tokens(4), 3)
    decision = fleet.choose(ask(tokens(4)), 0.0, {url_of(1)})
    assert (decision.reason, decision.matched_blocks) == (DecisionReason.ONLY_CANDIDATE, 3)


@pytest.mark.parametrize(
    "request_",
    [RouteRequest(None, None, True), RouteRequest(None, 900, False), ask([1, 2]), ask([])],
    ids=["not parsed", "not tokenised", "shorter than a block", "empty"],
)
def test_a_request_with_nothing_to_match_goes_by_load(make_fleet: MakeFleet, request_: RouteRequest) -> None:
    fleet = make_fleet(2)
    decision, ticket = send(fleet, request_, 0.0)
    assert decision.reason is DecisionReason.NO_PREFIX
    assert send(fleet, request_, 0.0)[0].worker_id != decision.worker_id
    ticket.release(0.1)


def test_no_prefix_is_said_when_no_view_may_be_used(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    for number in range(2):
        with pytest.raises(ValueError, match="no multiple"):
            fleet.apply_snapshot(url_of(number), snapshot(info(f"w{number}", 2, block_size=BLOCK + 1)), 0.0)
    assert fleet.choose(ask(tokens(9)), 0.0).reason is DecisionReason.NO_PREFIX


def test_equal_prompts_under_another_salt_do_not_match(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    hold(fleet, 0, tokens(4), 4)
    keys = PrefixKeys(pack_tokens(tokens(4)), BLOCK, CacheScope(salt="tenant"))
    assert fleet.choose(RouteRequest(keys, 17, True), 0.0).reason is DecisionReason.NO_MATCH


def test_explaining_changes_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, strategy="round_robin")
    first = fleet.choose(ask(tokens(9)), 0.0)
    assert [fleet.choose(ask(tokens(9)), 0.0) for _ in range(3)] == [first] * 3
    assert fleet.assumed_blocks == 0


def test_a_request_goes_to_workers_that_serve_its_model() -> None:
    fleet = Fleet(config())
    for number, model in enumerate(("a", "b", "b")):
        fleet.add(url_of(number))
        fleet.apply_snapshot(url_of(number), snapshot(info(f"w{number}", model=model)), 0.0)
    assert {c.worker_id for c in fleet.choose(ask(tokens(2), model="b"), 0.0).candidates} == {"w1", "w2"}
    assert len(fleet.choose(ask(tokens(2), model="unheard of"), 0.0).candidates) == 3
    assert len(fleet.choose(ask(tokens(2)), 0.0).candidates) == 3


# --- the other strategies -----------------------------------------------------------------------------------------


def test_round_robin_takes_turns_and_keeps_them_when_workers_come_and_go(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, strategy="round_robin")
    hold(fleet, 2, tokens(9), 9)
    chosen = [send(fleet, ask(tokens(9)), 0.0)[0] for _ in range(6)]
    assert [decision.worker_id for decision in chosen] == ["w0", "w1", "w2"] * 2
    assert {decision.reason for decision in chosen} == {DecisionReason.ROUND_ROBIN}
    assert chosen[2].matched_blocks == 9, "what a match would have been is told all the same"
    fleet.remove(url_of(0))
    assert [send(fleet, ask(tokens(9)), 0.0)[0].worker_id for _ in range(4)] == ["w1", "w2"] * 2


def test_least_loaded_counts_requests_its_own_and_others(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, strategy="least_loaded")
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 1, load=Load(2, 1, 0, 10, 10)), 0.0)
    decisions = [send(fleet, ask(tokens(2)), 0.0)[0] for _ in range(8)]
    assert [decision.worker_id for decision in decisions] == ["w1", "w2"] * 3 + ["w0", "w1"]
    assert decisions[0].reason is DecisionReason.LEAST_LOADED


def test_longest_prefix_ignores_load_and_takes_turns_among_equals(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, strategy="longest_prefix")
    prompt = tokens(9)
    assert fleet.choose(ask(prompt), 0.0).reason is DecisionReason.NO_MATCH
    hold(fleet, 1, prompt, 4)
    hold(fleet, 2, prompt, 4)
    decisions = [send(fleet, ask(prompt[: 4 * BLOCK + 1]), 0.0)[0] for _ in range(6)]
    assert [decision.worker_id for decision in decisions] == ["w1", "w2"] * 3
    assert {decision.reason for decision in decisions} == {DecisionReason.LONGEST_PREFIX}


def test_strategies_are_found_by_name() -> None:
    assert [find_strategy(name) for name in STRATEGIES] == list(STRATEGIES.values())
    with pytest.raises(UnknownStrategyError, match=", ".join(sorted(STRATEGIES))):
        find_strategy("random")
    with pytest.raises(UnknownStrategyError):
        Fleet(config(strategy=""))
