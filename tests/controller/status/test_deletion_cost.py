"""Deletion costs rank worker pods by the reuse of their caches, and change as little as possible.

Not covered: writing them (tests/kube/operator), and the scores themselves (tests/router/core).
"""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.status.deletion_cost import ANNOTATION, deletion_costs
from tests.controller.status.support import ROUTERS, WORKERS, ago, pod, report

NAMES = [each["metadata"]["name"] for each in WORKERS]


def annotated(costs: dict[str, int]) -> list[dict]:
    pods = []
    for name in NAMES:
        each = pod(name)
        if name in costs:
            each["metadata"]["annotations"] = {ANNOTATION: str(costs[name])}
        pods.append(each)
    return pods


def scores(*values: float, router: str = "a") -> dict:
    return {router: report(reuse_score=dict(zip(NAMES, values, strict=True)))}


def costs(reports: dict, before: dict[str, int] | None = None) -> list[int]:
    found = deletion_costs(reports, annotated(before or {}))
    return [found[name] for name in NAMES]


def test_the_least_reused_cache_costs_least():
    assert costs(scores(40.0, 10.0, 0.0, 20.0)) == [300, 100, 0, 200]


def test_the_routers_reuse_scores_are_added():
    assert costs(scores(40.0, 10.0, 0.0, 20.0) | scores(0.0, 100.0, 0.1, 0.0, router="b")) == [200, 300, 0, 100]


def test_the_scores_of_a_pods_data_parallel_ranks_are_added():
    ranked = {f"{name}/{rank}": 10.0 * rank * (at == 2) for at, name in enumerate(NAMES) for rank in range(3)}
    ranked[f"{NAMES[0]}/1"] = 25.0
    assert costs({"a": report(reuse_score=ranked)}) == [100, 0, 200, 0]


def test_without_an_answer_nothing_is_said():
    assert deletion_costs({}, WORKERS) == {}


def test_routers_and_pods_being_deleted_have_no_cost():
    leaving = pod("rag-worker-x")
    leaving["metadata"]["deletionTimestamp"] = ago(seconds=1)
    assert set(deletion_costs(scores(1.0, 1.0, 1.0, 1.0), [*WORKERS, leaving, *ROUTERS])) == set(NAMES)


def test_two_alike_keep_their_places():
    before = dict(zip(NAMES, costs(scores(10.0, 11.0, 12.0, 13.0)), strict=True))
    assert list(before.values()) == [100, 200, 300, 400]
    assert costs(scores(13.0, 12.0, 11.0, 12.0), before) == [100, 200, 300, 400]
    assert costs(scores(20.0, 12.0, 11.0, 12.0), before) == [400, 100, 200, 300]


def test_costs_in_order_stay_when_a_score_decays():
    before = dict(zip(NAMES, [100, 200, 300, 400], strict=True))
    assert costs(scores(0.0, 20.0, 30.0, 40.0), before) == [0, 200, 300, 400]


def test_a_strange_annotation_counts_as_none():
    pods = annotated({})
    pods[0]["metadata"]["annotations"] = {ANNOTATION: "much"}
    assert deletion_costs(scores(1.0, 2.0, 4.0, 8.0), pods)[NAMES[0]] == 100


SCORES = st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0]) | st.floats(0, 1e9), min_size=4, max_size=4)


@settings(deadline=None)
@given(SCORES, st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4))
def test_costs_are_stable_and_a_clearly_higher_score_costs_more(values, before):
    found = costs(scores(*values), dict(zip(NAMES, before, strict=True)))
    assert costs(scores(*values), dict(zip(NAMES, found, strict=True))) == found
    for first, cost in zip(values, found, strict=True):
        assert 0 <= cost < 2**31
        assert (cost == 0) == (first < 0.5)
    order = sorted(range(4), key=lambda index: found[index])
    for low, high in itertools.pairwise(order):
        assert values[low] < 0.5 or values[low] <= 1.25 * values[high]
