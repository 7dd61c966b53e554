"""Whether a request is sent again: retries, their budget, and 4xx answers, with time passed in.

Not covered: how the proxy carries this out and what clients see of it (tests/router/test_retries.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.retries import (
    DOUBT_AFTER,
    MAX_KINDS,
    REMEMBERED,
    WINDOW,
    Denial,
    Progress,
    Refusals,
    RequestKind,
    Retries,
    RetryBudget,
    RetryPolicy,
)


def retries(*, repeatable: bool = True, attempts: int = 4, floor: float = 10.0) -> Retries:
    made = Retries(RetryPolicy(attempts=attempts), RetryBudget(share=0.0, floor=floor), repeatable=repeatable)
    made.sent = 1
    return made


@pytest.mark.parametrize("progress", [Progress.UNANSWERED, Progress.ANSWERING])
def test_a_request_that_was_taken_up_and_not_answered_is_sent_once_more(progress: Progress) -> None:
    request = retries()
    assert request.failed(progress, 0.0) is None
    request.sent += 1
    assert request.failed(progress, 0.0) is Denial.SUSPECT


@pytest.mark.parametrize("progress", [Progress.UNSENT, Progress.DECLINED])
def test_one_that_no_worker_took_up_is_sent_as_often_as_any(progress: Progress) -> None:
    request, denials = retries(), []
    while not denials or denials[-1] is None:
        denials.append(request.failed(progress, 0.0))
        request.sent += 1
    assert denials == [None, None, None, Denial.ATTEMPTS]


def test_a_connection_that_died_counts_whatever_the_worker_had_read() -> None:
    request = retries()
    assert request.failed(Progress.UNSENT, 0.0, broken=True) is None
    assert request.failed(Progress.UNSENT, 0.0, broken=True) is Denial.SUSPECT


def test_being_turned_away_in_between_does_not_clear_a_suspect() -> None:
    request = retries()
    assert request.failed(Progress.UNANSWERED, 0.0) is None
    assert request.failed(Progress.DECLINED, 0.0) is None
    assert request.failed(Progress.UNANSWERED, 0.0) is Denial.SUSPECT


@pytest.mark.parametrize("progress", list(Progress))
def test_what_must_not_be_done_twice_is_sent_again_only_if_it_was_not_sent(progress: Progress) -> None:
    denial = retries(repeatable=False).failed(progress, 0.0)
    assert denial is (None if progress is Progress.UNSENT else Denial.UNSAFE)


def test_a_budget_that_is_spent_ends_it_but_for_what_was_never_sent() -> None:
    assert retries(floor=0.0).failed(Progress.DECLINED, 0.0) is Denial.BUDGET
    assert retries(floor=0.0).failed(Progress.UNSENT, 0.0) is None


# --- the budget -----------------------------------------------------------------------------------------------


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


# --- refusals -------------------------------------------------------------------------------------------------


A, B = "http://a", "http://b"
KIND = RequestKind("POST", "/v1/completions", "m")


def test_a_refusal_of_the_whole_kind_is_doubted_until_another_worker_agrees() -> None:
    refusals = Refusals()
    assert refusals.doubtful(A, KIND, 404, 0.0)
    refusals.agreed(A, KIND, 404, 0.0)
    refusals.agreed(B, KIND, 404, 0.0)
    assert not refusals.doubtful(A, KIND, 404, 1.0)
    assert not refusals.doubtful(B, KIND, 404, REMEMBERED)
    assert refusals.doubtful(A, KIND, 404, REMEMBERED + 0.1), "it is asked again now and then"
    assert refusals.doubtful(A, KIND._replace(model="another"), 404, 1.0)


def test_what_somebody_answers_is_served_so_a_refusal_of_it_is_doubted() -> None:
    refusals = Refusals()
    refusals.agreed(A, KIND, 404, 0.0)
    refusals.answered(B, KIND)
    assert refusals.doubtful(A, KIND, 404, 1.0)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_of_one_body_is_the_clients_fault_unless_the_worker_refuses_everything(status: int) -> None:
    refusals = Refusals()
    assert [refusals.doubtful(A, KIND, status, 0.0) for _ in range(DOUBT_AFTER + 1)] == [False] * DOUBT_AFTER + [True]
    refusals.agreed(A, KIND, status, 0.0)
    assert not refusals.doubtful(A, KIND, status, 0.0), "another worker refused it too"
    for _ in range(DOUBT_AFTER):
        refusals.answered(A, KIND)
        assert not refusals.doubtful(A, KIND, status, 0.0), "it answers others"


def test_memory_is_bounded() -> None:
    refusals = Refusals()
    for number in range(MAX_KINDS + 1):
        refusals.agreed(A, KIND._replace(model=f"m{number}"), 404, 0.0)
    assert refusals.doubtful(A, KIND._replace(model="m0"), 404, 0.0)
    assert not refusals.doubtful(A, KIND._replace(model="m1"), 404, 0.0)
