"""Workers without a cache feed: prompts are matched against what the router has sent there.

The hit rate is counted by caches of the test's own, which evict as an engine does. Not covered: how a worker is found
to have no feed (tests/router/test_feed.py), the blocks of answers, which a history does not know.
"""

from __future__ import annotations

import random
from collections import OrderedDict

from router.core.fleet import Fleet
from router.core.history import History
from router.core.index import PrefixIndex
from router.core.view import Trust
from tests.router.core.support import ask, config, info, keys_of, send, snapshot, tokens, url_of


def feedless(workers: int, **changes: object) -> Fleet:
    fleet = Fleet(config(**changes))
    for number in range(workers):
        fleet.add(url_of(number))
        fleet.mark_alive(url_of(number), 0.0)
        fleet.set_feedless(url_of(number), feedless=True)
    return fleet


def answered(fleet: Fleet, prompt: list[int], now: float, *, reused: bool = True) -> str:
    decision, ticket = send(fleet, ask(prompt), now)
    if reused:
        ticket.first_token(now + 0.1)
    ticket.release(now + 0.2, reused=reused)
    return decision.url


def matched(fleet: Fleet, prompt: list[int], now: float) -> int:
    return fleet.choose(ask(prompt), now).matched_blocks


def test_what_was_sent_is_matched_for_as_long_as_the_worker_should_hold_it() -> None:
    fleet = feedless(2)
    where = answered(fleet, tokens(8), 0.0)
    later = fleet.choose(ask(tokens(9)), 1000.0)
    assert (later.url, later.matched_blocks) == (where, 8)
    assert matched(fleet, tokens(8, start=5000), 1000.0) == 0


def test_what_never_reached_the_worker_is_not() -> None:
    fleet = feedless(1)
    answered(fleet, tokens(8), 0.0, reused=False)
    assert matched(fleet, tokens(8), 0.1) == 0


def test_the_least_recently_used_blocks_go_first_and_the_last_of_a_prompt_before_its_first() -> None:
    fleet = feedless(1, history_blocks=10)
    old, new = tokens(6), tokens(6, start=5000)
    answered(fleet, old, 0.0)
    answered(fleet, new, 1.0)
    assert (matched(fleet, old, 2.0), matched(fleet, new, 2.0)) == (4, 6)
    answered(fleet, old, 3.0)
    assert (matched(fleet, old, 4.0), matched(fleet, new, 4.0)) == (6, 4)


def test_a_new_process_holds_nothing() -> None:
    fleet = feedless(1)
    answered(fleet, tokens(8), 0.0)
    fleet.mark_unreachable(url_of(0), "refused")
    fleet.mark_alive(url_of(0), 1.0)
    assert matched(fleet, tokens(8), 1.0) == 0
    answered(fleet, tokens(8), 2.0)
    assert matched(fleet, tokens(8), 3.0) == 8


def test_a_request_that_is_over_after_its_worker_was_replaced_adds_nothing() -> None:
    fleet = feedless(1)
    _, ticket = send(fleet, ask(tokens(8)), 0.0)
    fleet.mark_unreachable(url_of(0), "refused")
    fleet.mark_alive(url_of(0), 1.0)
    ticket.release(2.0)
    assert matched(fleet, tokens(8), 3.0) == 0


def test_a_feed_that_comes_later_replaces_the_history() -> None:
    fleet = feedless(1)
    answered(fleet, tokens(8), 0.0)
    (status,) = fleet.workers(1.0)
    assert (status.history, status.matching, status.trust, status.blocks) == (True, False, Trust.PARTIAL, 8)
    assert "no cache feed" in status.why_not_matching
    fleet.apply_snapshot(url_of(0), snapshot(info(), keys=keys_of(tokens(3))), 1.0)
    (status,) = fleet.workers(1.0)
    assert (status.history, status.matching, status.blocks) == (False, True, 3)
    assert matched(fleet, tokens(8), 1.0) == 3


def test_it_is_bounded_and_the_index_has_exactly_its_blocks() -> None:
    index = PrefixIndex()
    history = History(index, index.open(), 7)
    for turn in range(20):
        keys = keys_of(tokens(1 + turn % 9, start=1000 * (turn % 3)))
        history.confirm_by(index.assume(0, keys), 0.0)
        assert len(history) == index.blocks(0) <= 7
        assert index.assumed_blocks() == 0
    assert set(index.held(0).values()) == {1}


class Engine:
    """A prefix cache of 120 blocks."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, prompt: list[int]) -> int:
        """Blocks that it reuses of the prompt."""
        keys = keys_of(prompt)
        reused = next((at for at, key in enumerate(keys) if key not in self._blocks), len(keys))
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > 120:
            self._blocks.popitem(last=False)
        return reused


def hit_rate(strategy: str, *, knows: bool = True) -> float:
    """Of 600 requests to four engines for one of 24 contexts of 16 blocks, each with 4 blocks of its own."""
    fleet, rng = feedless(4, strategy=strategy, history_blocks=120), random.Random(7)
    if not knows:
        for number in range(4):
            fleet.set_feedless(url_of(number), feedless=False)
    engines = {url_of(number): Engine() for number in range(4)}
    reused = total = 0
    for turn in range(600):
        now = 2.0 * turn
        for url in engines:
            fleet.mark_alive(url, now)
        prompt = [*tokens(16, start=100_000 * rng.randrange(24))[:-1], *tokens(4, start=10_000_000 + 100 * turn)]
        reused += engines[answered(fleet, prompt, now)].serve(prompt)
        total += 20
    return reused / total


def test_the_history_alone_raises_the_hit_rate_far_above_that_of_round_robin() -> None:
    own, turns = hit_rate("cache_aware"), hit_rate("round_robin")
    assert own > turns + 0.3
    assert own > hit_rate("cache_aware", knows=False) + 0.3
