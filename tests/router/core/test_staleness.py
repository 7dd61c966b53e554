"""A view or a load report that nothing has confirmed for the view timeout is not used until the feed is back.

Not covered: why a feed falls silent (tests/router/sync, tests/worker/agent).
"""

from __future__ import annotations

import pytest

from kvcache.feed import Batch, Load
from router.core.decision import DecisionReason
from router.core.fleet import Fleet
from tests.router.core.support import (
    CAPACITY,
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

PROMPT = tokens(40)
TIMEOUT = 10.0


def alive(fleet: Fleet, until: float) -> None:
    """Every engine gives signs of life; no feed does."""
    for url in [worker.url for worker in fleet.workers(until)]:
        fleet.mark_alive(url, until)
    fleet.expire(until)


@pytest.fixture
def fleet(make_fleet: MakeFleet) -> Fleet:
    """Two workers whose feeds come from agents; the first holds the prompt."""
    fleet = make_fleet(2, view_timeout=TIMEOUT)
    for number in range(2):
        fleet.add(url_of(number), feed_proves_liveness=False)
    hold(fleet, 0, PROMPT, 40)
    return fleet


def test_a_dead_agents_view_is_not_matched(fleet: Fleet) -> None:
    assert fleet.choose(ask(PROMPT), TIMEOUT).reason is DecisionReason.PREFIX_MATCH
    alive(fleet, TIMEOUT + 0.1)
    fleet.apply_batch(url_of(1), Batch(1, 0, (), idle()), TIMEOUT + 0.1)
    decision = fleet.choose(ask(PROMPT), TIMEOUT + 0.1)
    assert [candidate.matched_blocks for candidate in decision.candidates] == [0, 0]
    assert decision.reason is DecisionReason.NO_MATCH
    first, second = fleet.workers(TIMEOUT + 0.1)
    assert first.ready
    assert not first.matching
    assert "more than 10 s" in first.why_not_matching
    assert first.view_age == pytest.approx(TIMEOUT + 0.1)
    assert second.matching


def test_with_no_view_to_use_there_is_no_prefix(fleet: Fleet) -> None:
    alive(fleet, TIMEOUT + 1)
    assert fleet.choose(ask(PROMPT), TIMEOUT + 1).reason is DecisionReason.NO_PREFIX


def test_what_was_sent_to_a_worker_of_unknown_cache_is_not_matched_either(fleet: Fleet) -> None:
    alive(fleet, TIMEOUT + 1)
    decision, ticket = send(fleet, ask(PROMPT), TIMEOUT + 1)
    again = fleet.choose(ask(PROMPT), TIMEOUT + 1)
    assert max(candidate.matched_blocks for candidate in again.candidates) == decision.matched_blocks == 0
    ticket.release(TIMEOUT + 2)


def test_it_is_matched_again_as_soon_as_its_feed_goes_on(fleet: Fleet) -> None:
    alive(fleet, 50.0)
    assert not fleet.workers(50.0)[0].matching
    fleet.apply_batch(url_of(0), Batch(1, 1, (), idle()), 50.0)
    assert fleet.workers(50.0)[0].matching
    assert fleet.choose(ask(PROMPT), 50.0).matched_blocks == 40, "the copy was kept"


def test_a_new_incarnation_of_the_feed_is_matched_by_what_it_states(fleet: Fleet) -> None:
    alive(fleet, 50.0)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0", 2), 1, keys_of(PROMPT)[:7]), 50.0)
    assert fleet.choose(ask(PROMPT), 50.0).matched_blocks == 7


def test_a_report_of_load_ends_too(fleet: Fleet) -> None:
    busy = Load(running=50, waiting=9, prefill_tokens=9000, free_blocks=0, total_blocks=CAPACITY)
    fleet.apply_batch(url_of(0), Batch(1, 1, (), busy), 1.0)
    assert fleet.choose(ask(tokens(3, start=900)), 1.0).url == url_of(1)
    alive(fleet, 1.0 + TIMEOUT)
    assert fleet.workers(1.0 + TIMEOUT)[0].load == busy
    alive(fleet, 1.1 + TIMEOUT)
    first, second = fleet.workers(1.1 + TIMEOUT)
    assert first.load is second.load is None
    assert first.queue_seconds == second.queue_seconds == 0.0
    candidates = fleet.choose(ask(PROMPT), 1.1 + TIMEOUT).candidates
    assert [candidate.in_flight for candidate in candidates] == [0, 0]
