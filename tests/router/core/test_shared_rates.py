"""Rates that several routers share: what a key gets over time, wherever its requests go.

Not covered: how routers ask one another (tests/router/test_rate_exchange.py), one router's buckets (test_rates.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.rates import MINUTE, RateLimiter, Rates
from router.core.shared_rates import SILENCE, KeyUse, RateReport, SharedRates, key_name, report

KEY = "key"
RATES = Rates(requests=60, tokens=600)


class Routers:
    """Routers that hear one another once a second, unless they are `apart`. Time stands still but for `second`."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.apart = False
        self.started = 0
        self.limiters: list[RateLimiter] = []
        self.names: list[str] = []
        self.shared: list[SharedRates] = []
        for _ in range(count):
            self.start()

    def start(self) -> None:
        """One more router."""
        self.started += 1
        self.names.append(f"instance-{self.started}")
        self.limiters.append(RateLimiter(RATES, self.now))
        self.shared.append(SharedRates())

    def stop(self, at: int) -> None:
        for each in (self.names, self.limiters, self.shared):
            del each[at]

    def second(self) -> None:
        """A second passes, and each hears the others."""
        self.now += 1.0
        if not self.apart:
            for at, shared in enumerate(self.shared):
                for other, limiter in enumerate(self.limiters):
                    if other != at:
                        known = shared.knows(self.names[other], self.now)
                        said = report(self.names[other], {KEY: limiter}, self.now, known=known)
                        shared.learn(said, {KEY: self.limiters[at]}, self.now)
        for shared in self.shared:
            shared.forget(self.now)

    def ask(self, at: int, times: int = 1) -> int:
        """How many of so many requests router `at` admits."""
        return sum(self.limiters[at].arrive(self.now) is None for _ in range(times))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("spread", [True, False], ids=["at all of them", "at one of them"])
def test_a_key_gets_its_rate_once_whatever_routers_its_requests_go_to(count: int, spread: bool) -> None:
    routers = Routers(count)
    routers.ask(0, 60)  # the bucket is empty
    for _ in range(5):
        routers.second()
    admitted = 0
    for _ in range(600):
        for at in range(count if spread else 1):
            admitted += routers.ask(at, 3)
        routers.second()
    assert admitted == pytest.approx(600 * 60 / MINUTE, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90)), min_size=1, max_size=200),
)
def test_no_pattern_of_requests_gets_more_than_a_bucket_for_each_router_beyond_the_rate(
    count: int, asked: list[tuple[int, int]]
) -> None:
    routers = Routers(count)
    admitted = 0
    for at, times in asked:
        admitted += routers.ask(at % count, times)
        routers.second()
        assert admitted <= routers.now * 60 / MINUTE + count * 60


def test_a_burst_at_all_routers_is_paid_for_afterwards() -> None:
    routers = Routers(3)
    routers.second()
    assert sum(routers.ask(at, 100) for at in range(3)) == 180
    for second in range(125):
        routers.second()
        if second < 118:  # 120 were too many, at one a second
            assert [routers.ask(at) for at in range(3)] == [0, 0, 0], second
    assert routers.ask(0) == 1


def test_tokens_that_an_answer_used_elsewhere_are_paid_for_here_too() -> None:
    routers = Routers(2)
    routers.second()
    assert routers.limiters[0].charge(100, routers.now) is None
    routers.limiters[0].settle(100, 400, routers.now)
    routers.second()
    tokens = [each.tokens.level(routers.now) for each in routers.limiters if each.tokens is not None]
    assert tokens == [210, 200]  # the first has got ten back in the second before the other heard of it


def test_what_is_given_back_elsewhere_is_given_back_here() -> None:
    routers = Routers(2)
    routers.limiters[0].charge(500, routers.now)
    routers.second()
    routers.second()
    routers.limiters[0].settle(500, 0, routers.now)
    routers.second()
    assert [each.tokens.level(routers.now) for each in routers.limiters if each.tokens is not None] == [600, 600]


def test_a_router_that_starts_does_not_hand_out_another_minute() -> None:
    routers = Routers(2)
    routers.ask(0, 60)
    for _ in range(3):
        routers.second()
    routers.stop(1)
    routers.start()
    routers.second()
    assert routers.ask(1, 60) <= 5


def test_routers_that_were_apart_do_not_stop_a_key_that_kept_to_its_rate() -> None:
    routers = Routers(2)
    routers.second()
    routers.apart = True
    for _ in range(600):
        routers.ask(0, 2)
        routers.ask(1, 2)
        routers.second()
    routers.apart = False
    routers.second()
    admitted = 0
    for _ in range(60):
        admitted += routers.ask(0, 2)
        routers.second()
    assert admitted >= 55


def test_a_key_that_was_used_long_ago_elsewhere_is_not_charged_for_that() -> None:
    routers = Routers(2)
    routers.limiters[0].arrive(routers.now)
    routers.now += 120.0
    routers.second()
    assert routers.limiters[0].arrive(routers.now) is None
    routers.second()
    levels = [each.requests.level(routers.now) for each in routers.limiters if each.requests is not None]
    assert levels == [60, 59]  # the first has got one back meanwhile


def test_a_router_that_is_gone_is_forgotten() -> None:
    shared, limiter = SharedRates(), RateLimiter(RATES, 0.0)
    shared.learn(RateReport("a", {}), {}, 0.0)
    shared.forget(SILENCE)
    assert shared.known() == 1
    shared.forget(SILENCE + 0.1)
    assert shared.known() == 0
    # It comes back: its counts are of before, and nothing is taken for them.
    shared.learn(RateReport("a", {KEY: KeyUse(1000, 1000)}), {KEY: limiter}, 60.0)
    assert limiter.requests is not None
    assert limiter.requests.level(60.0) == 60


def test_what_is_said_of_keys_that_are_unknown_here_or_have_no_rate_changes_nothing() -> None:
    shared, limiter = SharedRates(), RateLimiter(Rates(requests=60), 0.0)
    for count in (0, 10):
        said = {"other": KeyUse(count, count, 0.0, 0.0), KEY: KeyUse(count, 10_000 * count, 60.0, None)}
        shared.learn(RateReport("a", said), {KEY: limiter}, 0.0)
    assert limiter.requests is not None
    assert (limiter.requests.level(0.0), limiter.tokens) == (50, None)


def test_keys_that_are_not_used_are_not_told_of() -> None:
    used, unused = RateLimiter(RATES, 0.0), RateLimiter(RATES, 0.0)
    used.arrive(0.0)
    told = {"used": KeyUse(1, 0, 59.0, 600.0)}
    for known in (True, False):
        assert report("a", {"used": used, "unused": unused}, 0.0, known=known).keys == told
    assert report("a", {"used": used, "unused": unused}, 60.0, known=True).keys == {}
    assert report("a", {"used": used, "unused": unused}, 60.0, known=False).keys == {"used": KeyUse(1, 0, 60.0, 600.0)}


def test_a_key_is_not_named_by_its_digest() -> None:
    digest = bytes(range(32))
    assert len(key_name(digest)) == 16
    assert key_name(digest) not in digest.hex()
