"""Rates of API keys: what is admitted, when to try again, and that nothing is lost or made in the accounts.

Not covered: how requests are refused over HTTP, and what their answers used (tests/router/test_auth.py).
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.rates import MINUTE, UNLIMITED, Exceeded, Limit, RateLimiter, Rates

PAUSES = st.floats(0, 50, allow_nan=False)
TOKENS = st.integers(0, 400)


def test_a_minutes_requests_may_come_at_once_and_the_next_when_one_has_come_back() -> None:
    limiter = RateLimiter(Rates(requests=30), 100.0)
    assert [limiter.arrive(100.0) for _ in range(30)] == [None] * 30

    assert limiter.arrive(100.0) == Exceeded(Limit.REQUESTS, 30, pytest.approx(2.0))
    assert limiter.arrive(101.9) == Exceeded(Limit.REQUESTS, 30, pytest.approx(0.1))
    assert limiter.arrive(102.0) is None
    assert limiter.arrive(102.0) is not None


def test_a_key_without_rates_is_never_refused() -> None:
    limiter = RateLimiter(UNLIMITED, 0.0)
    assert {limiter.arrive(0.0) for _ in range(1000)} == {None}
    assert limiter.charge(10**9, 0.0) is None


def test_a_prompt_larger_than_a_minutes_tokens_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    limiter = RateLimiter(Rates(tokens=600), 0.0)
    assert limiter.charge(1, 0.0) is None
    assert limiter.charge(6000, 0.0) == Exceeded(Limit.TOKENS, 600, pytest.approx(0.1))
    assert limiter.charge(6000, 0.1) is None

    # 5400 tokens are owed, at 10 a second, before one is there.
    assert limiter.arrive(0.1) == Exceeded(Limit.TOKENS, 600, pytest.approx(540.1))
    assert limiter.arrive(540.3) is None


def test_a_request_that_is_refused_for_its_tokens_is_not_counted() -> None:
    limiter = RateLimiter(Rates(requests=2, tokens=100), 0.0)
    for _ in range(5):
        assert limiter.arrive(0.0) is None
        limiter.charge(90, 0.0)
    assert limiter.requests is not None
    assert limiter.requests.level(0.0) == 1


def test_tokens_that_an_answer_did_not_use_are_given_back_and_those_it_used_beyond_are_taken() -> None:
    limiter = RateLimiter(Rates(tokens=600), 0.0)
    assert limiter.tokens is not None
    assert limiter.charge(500, 0.0) is None
    limiter.settle(500, 0, 0.0)
    assert limiter.tokens.level(0.0) == 600
    assert limiter.charge(100, 0.0) is None
    limiter.settle(100, 900, 0.0)
    assert limiter.tokens.level(0.0) == -300


def test_what_was_used_stays_used_when_the_rates_change() -> None:
    limiter = RateLimiter(Rates(requests=10), 0.0)
    for _ in range(8):
        limiter.arrive(0.0)
    limiter.change(Rates(requests=20, tokens=5), 0.0)
    assert limiter.requests is not None
    assert limiter.tokens is not None
    assert (limiter.requests.level(0.0), limiter.tokens.level(0.0)) == (12, 5)

    limiter.change(Rates(requests=4), 0.0)
    assert limiter.requests.level(0.0) == -4
    assert limiter.tokens is None


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(1, 200), pauses=st.lists(PAUSES, min_size=1, max_size=80))
def test_no_span_of_time_admits_more_than_a_bucket_and_what_came_in_meanwhile(rate: float, pauses: list[float]) -> None:
    limiter, now, admitted = RateLimiter(Rates(requests=rate), 0.0), 0.0, []
    for pause in pauses:
        now += pause
        for _ in range(10):
            if limiter.arrive(now) is None:
                admitted.append(now)
    for first, begin in enumerate(admitted):
        for last, end in enumerate(admitted[first:], first):
            assert last - first + 1 <= rate + (end - begin) * rate / MINUTE + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1, 200),
    requests=st.lists(st.tuples(PAUSES, TOKENS, TOKENS), min_size=1, max_size=40),
)
def test_a_refused_request_is_admitted_when_its_retry_after_is_over_and_not_before(
    rate: float, requests: list[tuple[float, int, int]]
) -> None:
    limiter, now = RateLimiter(Rates(tokens=rate), 0.0), 0.0
    for pause, charged, used in requests:
        now += pause
        refused = limiter.charge(charged, now)
        if refused is not None:
            assert refused.retry_after > 0
            assert limiter.charge(charged, now + refused.retry_after * 0.99) is not None
            now += refused.retry_after + 1e-6
            assert limiter.charge(charged, now) is None
        limiter.settle(charged, used, now)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1, 200),
    requests=st.lists(st.tuples(PAUSES, TOKENS, TOKENS), min_size=1, max_size=40),
)
def test_in_the_long_run_no_more_tokens_are_used_than_came_in(
    rate: float, requests: list[tuple[float, int, int]]
) -> None:
    limiter, now, used_in_all = RateLimiter(Rates(tokens=rate), 0.0), 0.0, 0
    for pause, charged, used in requests:
        now += pause
        if limiter.arrive(now) is None and limiter.charge(charged, now) is None:
            limiter.settle(charged, used, now)
            used_in_all += used
    # What is beyond the bucket and what came in is owed, and at most one request's tokens can be.
    assert used_in_all <= rate + now * rate / MINUTE + 400 + 1e-6
    assert limiter.tokens is not None
    assert limiter.tokens.level(now) <= rate
    assert math.isfinite(limiter.tokens.level(now))
