"""Reuse scores, popular prefixes and the prefill that was saved, with time passed in.

Not covered: what the scores are used for (tests/controller/status/test_deletion_cost.py), and how popularity changes a
decision (test_decisions.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.fleet import Fleet
from router.core.latency_samples import Usage
from router.core.reuse import HALF_LIFE, REMEMBERED, PrefixPopularity, ReuseScore
from tests.router.core.support import BLOCK, MakeFleet, ask, config, hold, info, send, snapshot, tokens, url_of


def test_it_halves_with_every_half_life() -> None:
    score = ReuseScore(600.0)
    assert score.value(5.0) == 0.0
    score.add(8, 100.0)
    assert score.value(100.0) == 8.0
    assert score.value(700.0) == pytest.approx(4.0)
    score.add(4, 700.0)
    assert score.value(1900.0) == pytest.approx(2.0)
    score.clear()
    assert score.value(1900.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.0, 5000.0), st.integers(0, 1000)), max_size=20))
def test_it_is_the_sum_of_what_each_request_reused(steps: list[tuple[float, int]]) -> None:
    score, now, added = ReuseScore(600.0), 0.0, []
    for pause, blocks in steps:
        now += pause
        score.add(blocks, now)
        added.append((now, blocks))
    assert score.value(now) == pytest.approx(
        sum(blocks * 2.0 ** ((at - now) / 600.0) for at, blocks in added), abs=1e-6
    )


def score_of(fleet: Fleet, now: float) -> float:
    return fleet.workers(now)[0].reuse_score


PROMPT = tokens(3)


def reused_twice(make_fleet: MakeFleet) -> Fleet:
    """A fleet whose worker 0 has served one request that found two of its blocks."""
    fleet = make_fleet(1)
    hold(fleet, 0, PROMPT, 2)
    _, ticket = send(fleet, ask(PROMPT), 1.0)
    assert score_of(fleet, 1.0) == 0.0  # it has not been served yet
    ticket.release(2.0)
    ticket.release(3.0)
    return fleet


def test_a_request_that_was_served_counts_once(make_fleet: MakeFleet) -> None:
    assert score_of(reused_twice(make_fleet), 2.0) == 2.0


def test_a_request_that_never_ran_counts_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    hold(fleet, 0, PROMPT, 2)
    send(fleet, ask(PROMPT), 1.0)[1].release(2.0, reused=False)
    assert score_of(fleet, 2.0) == 0.0


def test_a_new_incarnation_of_the_worker_starts_at_0(make_fleet: MakeFleet) -> None:
    fleet = reused_twice(make_fleet)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0", epoch=2)), 3.0)
    assert score_of(fleet, 3.0) == 0.0


def test_a_new_snapshot_of_the_same_incarnation_changes_nothing(make_fleet: MakeFleet) -> None:
    fleet = reused_twice(make_fleet)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 9), 2.0)
    assert score_of(fleet, 2.0) == 2.0


def test_only_the_latest_longest_matches_are_remembered() -> None:
    popularity = PrefixPopularity(4.0, 1.0)
    first, *others = (number.to_bytes(16, "big") for number in range(REMEMBERED + 1))
    popularity.note(first)
    assert popularity.find(first) is None
    popularity.note(first)
    assert popularity.find(first) is not None
    for key in others:
        popularity.note(key)
    assert popularity.find(first) is None


def test_the_shares_of_popular_prefixes_are_those_of_their_latest_matches() -> None:
    """Histories of conversations, each matched once, take no part; what nobody asks for any more fades."""
    popularity = PrefixPopularity(4.0, 1.0)
    often, seldom = b"often", b"seldom"
    for turn in range(400):
        popularity.note(seldom if turn % 4 == 0 else often)
        popularity.note(turn.to_bytes(16, "big"))
    shares = [found.share for key in (often, seldom) if (found := popularity.find(key)) is not None]
    assert shares == pytest.approx([0.75, 0.25], abs=0.02)
    for _ in range(2 * HALF_LIFE):
        popularity.note(seldom)
    found = popularity.find(often)
    assert found is not None
    assert found.share < 0.25


# --- the prefill that was saved ---


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.sampled_from([0.5, 1.0, 3.0])), max_size=12))
@settings(max_examples=40)
def test_the_seconds_saved_are_those_of_the_blocks_that_were_cached(answers: list[tuple[int, int, float]]) -> None:
    """By the arithmetic of docs/profiles.md, times the factor that the router shows for the worker."""
    fleet = Fleet(config())
    fleet.add(url_of(0))
    fleet.mark_alive(url_of(0), 0.0)
    hold(fleet, 0, tokens(1), 0)
    now = 1.0
    for blocks, held, slower in answers:
        prompt = tokens(blocks)
        cached = min(held, blocks)
        _, ticket = send(fleet, ask(prompt), now)
        (status,) = fleet.workers(now)
        whole = 0.005 + 0.0025 * (blocks + 1)
        rest = 0.0005 if cached == blocks else 0.005 + 0.0025 * (blocks + 1 - cached)
        saved = ticket.reported(len(prompt), cached * BLOCK, now)
        assert saved == pytest.approx((whole - rest) * status.latency_factor)
        now += slower * rest  # what the answer's time teaches changes the factor of the next one
        ticket.first_token(now)
        ticket.finished(now, Usage(len(prompt), 1, cached * BLOCK))
        ticket.release(now)
        now += 1.0
