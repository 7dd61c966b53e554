"""Whose fault a refusal is."""

from __future__ import annotations

import pytest

from router.core.refusals import DOUBT_AFTER, MAX_KINDS, REMEMBERED, Kind, Refusals

A, B = "http://a", "http://b"
KIND = Kind("POST", "/v1/completions", "m")


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
