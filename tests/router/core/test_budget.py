"""The retry budget, on virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.core.budget import WINDOW, RetryBudget


def test_a_share_of_the_traffic_and_a_floor() -> None:
    budget = RetryBudget(share=0.2, floor=1.0)
    for number in range(100):
        budget.request(number * 0.01)
    granted = sum(budget.retry(1.0) for _ in range(100))
    assert granted == 0.2 * 100 + 1.0 * WINDOW


def test_what_is_old_neither_grants_nor_costs() -> None:
    budget = RetryBudget(share=0.5, floor=0.0)
    for _ in range(10):
        budget.request(0.0)
    assert [budget.retry(9.9) for _ in range(6)] == [True] * 5 + [False]
    assert not budget.retry(10.0), "the requests are ten seconds old"
    budget.request(19.9)
    budget.request(19.9)
    assert budget.retry(20.0)


def test_without_a_share_or_a_floor_nothing_is_sent_twice() -> None:
    budget = RetryBudget(share=0.0, floor=0.0)
    budget.request(0.0)
    assert not budget.retry(0.0)


@given(
    share=st.floats(0, 1),
    floor=st.floats(0, 5),
    steps=st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200),
)
def test_no_window_has_more_retries_than_the_budget(
    share: float, floor: float, steps: list[tuple[float, bool]]
) -> None:
    budget = RetryBudget(share=share, floor=floor)
    now, requests, retries = 0.0, [], []
    for pause, is_retry in steps:
        now += pause
        if not is_retry:
            budget.request(now)
            requests.append(int(now))
        elif budget.retry(now):
            retries.append(int(now))
            first = int(now) - WINDOW
            sent, came = sum(at > first for at in retries), sum(at > first for at in requests)
            assert sent <= share * came + floor * WINDOW
        else:
            first = int(now) - WINDOW
            sent, came = sum(at > first for at in retries), sum(at > first for at in requests)
            assert sent + 1 > share * came + floor * WINDOW, "one that the budget had room for was refused"
