from __future__ import annotations

import pytest

from router.core.budget import RetryBudget
from router.core.retries import Denial, Progress, Retries, RetryPolicy


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
