"""Blocks that workers can load from slower tiers: how they are matched, what a load costs, and how others are served
meanwhile.

Not covered: the search itself (`test_index.py`), and whether an engine does what is predicted
(`tests/bench/test_simulate.py`).
"""

from __future__ import annotations

import pytest

from kvcache.feed import Batch, Cleared, HeldElsewhere, Removed, Snapshot, Stored, Tier
from router.core.fleet import Fleet
from router.core.ledger import Ledger
from tests.router.core.support import LATENCY, MakeFleet, ask, idle, info, keys_of, send, tokens, url_of

CPU, DISK = 0.0005, 0.002
"""Seconds that loading one block takes; computing it takes 2.5 ms."""
PROMPT = tokens(20)
KEYS = keys_of(PROMPT)


def hold(fleet: Fleet, number: int, gpu: int, cpu: range = range(0), disk: range = range(0), **fields: object) -> None:
    """Worker `number` has the first `gpu` blocks of PROMPT on its GPU and these in its slower tiers."""
    fields = {"tier_seconds": {Tier.CPU: CPU, Tier.DISK: DISK}} | fields
    elsewhere = tuple(
        HeldElsewhere(tier, 0, tuple(KEYS[at] for at in held))
        for tier, held in ((Tier.CPU, cpu), (Tier.DISK, disk))
        if held
    )
    state = Snapshot(info(f"w{number}", **fields), 1, idle(), tuple((key, None) for key in KEYS[:gpu]), elsewhere)
    fleet.apply_snapshot(url_of(number), state, 0.0)


def test_a_load_costs_its_seconds_and_computing_costs_what_is_left(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 4, range(4, 12), range(10, 15))
    (candidate,) = fleet.choose(ask(PROMPT), 0.0).candidates
    assert candidate.matched_blocks == 15
    assert candidate.loaded_blocks == {Tier.CPU: 8, Tier.DISK: 3}
    assert candidate.load_seconds == pytest.approx(8 * CPU + 3 * DISK)
    assert candidate.prefill_seconds == LATENCY.prefill(6)
    assert candidate.cost == pytest.approx(candidate.load_seconds + candidate.prefill_seconds)
    decision = fleet.choose(ask(PROMPT), 0.0)
    assert decision.matched_blocks == decision.reported_blocks == 15
    assert decision.predicted_ttft == pytest.approx(candidate.load_seconds + candidate.prefill_seconds)


@pytest.mark.parametrize(
    ("gpu", "cpu", "chosen"),
    [
        pytest.param(20, 0, 0, id="the GPU's blocks cost nothing"),
        pytest.param(10, 10, 0, id="ten blocks are loaded sooner than twenty"),
        pytest.param(4, 0, 1, id="twenty blocks are loaded sooner than sixteen are computed"),
    ],
)
def test_the_cheapest_way_to_the_prompt_is_chosen(make_fleet: MakeFleet, gpu: int, cpu: int, chosen: int) -> None:
    fleet = make_fleet(2)
    hold(fleet, 0, gpu, range(gpu, gpu + cpu))
    hold(fleet, 1, 0, range(20))
    decision = fleet.choose(ask(PROMPT), 0.0)
    assert decision.url == url_of(chosen)


def test_a_slow_tier_costs_what_it_costs(make_fleet: MakeFleet) -> None:
    """vLLM loads what it finds even where computing would be faster, so the prediction says so, and another worker that
    computes everything is cheaper."""
    fleet = make_fleet(2, recompute_charge=0.0)
    hold(fleet, 0, 0, disk=range(20), tier_seconds={Tier.DISK: 0.01})
    hold(fleet, 1, 0)
    decision = fleet.choose(ask(PROMPT), 0.0)
    assert decision.url == url_of(1)
    assert decision.candidates[0].load_seconds == pytest.approx(0.2)


def test_a_missing_block_ends_the_run(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 4, range(4, 20))
    fleet.apply_batch(url_of(0), Batch(1, 2, (Removed((KEYS[6],), Tier.CPU),), idle()), 0.0)
    assert fleet.choose(ask(PROMPT), 0.0).matched_blocks == 6
    fleet.apply_batch(url_of(0), Batch(1, 3, (Stored(KEYS[5], (KEYS[6],), Tier.DISK),), idle()), 0.0)
    assert fleet.choose(ask(PROMPT), 0.0).candidates[0].loaded_blocks == {Tier.CPU: 15, Tier.DISK: 1}
    fleet.apply_batch(url_of(0), Batch(1, 4, (Cleared(),), idle()), 0.0)
    assert fleet.choose(ask(PROMPT), 0.0).matched_blocks == 0


def test_the_gpus_eviction_leaves_the_copy(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 20, range(20))
    fleet.apply_batch(url_of(0), Batch(1, 2, (Removed(tuple(reversed(KEYS[3:]))),), idle()), 0.0)
    decision = fleet.choose(ask(PROMPT), 0.0)
    assert decision.loaded_blocks == {Tier.CPU: 17}
    (status,) = fleet.workers(0.0)
    assert (status.blocks, status.slower_blocks) == (3, {Tier.CPU: 20, Tier.DISK: 0})


def test_blocks_of_a_tier_without_a_time_are_not_used(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 4, range(4, 20), tier_seconds={})
    fleet.apply_batch(url_of(0), Batch(1, 2, (Stored(KEYS[3], (KEYS[4],), Tier.CPU),), idle()), 0.0)
    fleet.apply_batch(url_of(0), Batch(1, 3, (Removed((KEYS[9],), Tier.CPU),), idle()), 0.0)
    assert fleet.choose(ask(PROMPT), 0.0).matched_blocks == 4
    assert fleet.workers(0.0)[0].unknown_removals == 0


def test_a_load_may_cover_the_last_token(make_fleet: MakeFleet) -> None:
    """A hit on the GPU never does; vLLM then computes only that token again."""
    fleet = make_fleet(1)
    hold(fleet, 0, 20, range(20))
    assert fleet.choose(ask(PROMPT[:-1]), 0.0).loaded_blocks == {Tier.CPU: 1}
    hold(fleet, 0, 0, range(20), epoch=2)
    decision = fleet.choose(ask(PROMPT[:-1]), 0.0)
    assert (decision.matched_blocks, decision.prefill_seconds) == (20, LATENCY.prefill_cached)
    assert fleet.choose(ask(PROMPT[:4]), 0.0).matched_blocks == 1


def test_loads_follow_one_another_and_let_others_compute(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 0, range(20))
    first, ticket = send(fleet, ask(PROMPT), 0.0)
    assert first.predicted_ttft == pytest.approx(20 * CPU + LATENCY.prefill_cached)
    other = fleet.choose(ask(tokens(2, start=5000)), 0.0)
    assert other.queue_seconds == 0.0, "the engine computes it while the load runs"
    hold(fleet, 0, 0, range(20), epoch=2)  # the blocks that were assumed on the GPU are forgotten
    second = fleet.choose(ask(PROMPT), 0.001)
    assert second.candidates[0].load_seconds == pytest.approx(2 * 20 * CPU - 0.001)
    ticket.first_token(0.02)
    ticket.release(0.03)


def test_what_is_being_loaded_is_expected_on_the_gpu(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, 0, range(20))
    send(fleet, ask(PROMPT), 0.0)
    again = fleet.choose(ask(PROMPT), 0.001)
    assert (again.matched_blocks, again.loaded_blocks) == (20, {})


def test_a_ledger_lets_a_loading_request_join_the_queue_when_its_load_ends() -> None:
    ledger = Ledger()
    loading = ledger.open(0.1, 1, True, 0.0, load=1.0)
    assert (ledger.remaining(0.5), ledger.decoding, ledger.waiting) == (0.0, 0, True)
    other = ledger.open(0.2, 1, True, 0.9)
    assert ledger.remaining(1.0) == pytest.approx(0.1 + 0.1)
    assert ledger.first_token(other, 1.1) is None, "the two may have shared a step"
    assert ledger.remaining(1.15) == pytest.approx(0.05)
    ledger.first_token(loading, 1.2)
    assert (ledger.remaining(1.2), ledger.decoding, ledger.waiting) == (0.0, 2, False)
    for entry in (loading, other):
        ledger.close(entry, 2.0)
    assert (ledger.in_flight, ledger.blocks) == (0, 0)


@pytest.mark.parametrize("answered", [True, False], ids=["answered early", "released"])
def test_a_load_that_ends_unexpectedly_leaves_nothing(answered: bool) -> None:
    ledger = Ledger()
    entry = ledger.open(0.1, 1, False, 0.0, context=50, load=1.0)
    if answered:
        assert ledger.first_token(entry, 0.5) is None
        assert (ledger.decoding, ledger.context) == (1, 50)
    ledger.close(entry, 0.6)
    ledger.close(entry, 0.6)
    assert (ledger.in_flight, ledger.blocks, ledger.context, ledger.reserved) == (0, 0, 0, 0)
    assert (ledger.remaining(5.0), ledger.waiting) == (0.0, False)
