"""The fake node's arithmetic of rolling updates, and which pods end first, are Kubernetes' own.

Not covered: percentages, the strategy Recreate and proportional scaling, which are not played; updates with pods
(test_kubelet.py), the status (test_pod_states.py).
"""

from __future__ import annotations

import pytest

from tests.kube.kubelet.rollout import Counted, deletion_cost, limits, next_step, victims


def rolling(surge: int, unavailable: int) -> dict[str, object]:
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}


def sized(wanted: int, ready: int = 0) -> Counted:
    return Counted(wanted, wanted, ready)


@pytest.mark.parametrize(
    ("surge", "unavailable", "desired", "expected"),
    [
        pytest.param(0, 0, 3, (0, 1), id="neither"),
        pytest.param(1, 0, 3, (1, 0), id="surge"),
        pytest.param(0, 10, 3, (0, 3), id="more than there are"),
    ],
)
def test_something_may_always_be_added_or_missing(surge, unavailable, desired, expected):
    assert limits(rolling(surge, unavailable), desired) == expected


STEPS = [
    pytest.param(rolling(1, 0), 3, sized(0), [], (3, ()), id="first pods"),
    pytest.param(rolling(1, 0), 5, sized(3, 3), [], (5, ()), id="up"),
    pytest.param(rolling(1, 0), 1, sized(3, 3), [], (1, ()), id="down"),
    pytest.param(rolling(1, 0), 0, sized(2, 2), [], (0, ()), id="to nothing"),
    pytest.param(rolling(1, 0), 2, sized(0), [sized(2, 2)], (1, (2,)), id="begins with what may be added"),
    pytest.param(rolling(1, 0), 2, sized(1, 0), [sized(2, 2)], (1, (2,)), id="waits for the new pod"),
    pytest.param(rolling(1, 0), 2, sized(1, 1), [sized(2, 2)], (1, (1,)), id="then takes one away"),
    pytest.param(rolling(1, 0), 2, sized(1, 1), [sized(1, 1)], (2, (1,)), id="and goes on"),
    pytest.param(rolling(0, 1), 3, sized(0), [sized(3, 3)], (0, (2,)), id="without surge one goes first"),
    pytest.param(rolling(0, 1), 3, sized(0), [sized(2, 2)], (1, (2,)), id="and then one comes"),
    pytest.param(rolling(1, 0), 3, sized(1, 0), [sized(3, 2)], (1, (3,)), id="none may be missing"),
    pytest.param(rolling(1, 1), 4, sized(1, 0), [sized(2, 0), sized(2, 2)], (1, (1, 2)), id="who serves nobody goes"),
    pytest.param(rolling(2, 0), 4, sized(2, 2), [sized(1, 1), sized(3, 3)], (2, (0, 2)), id="the oldest first"),
    pytest.param({"type": "Recreate"}, 2, sized(0), [], (2, ()), id="Recreate, first pods"),
]


@pytest.mark.parametrize(("strategy", "desired", "new", "old", "expected"), STEPS)
def test_one_step_of_a_rolling_update(strategy, desired, new, old, expected):
    step = next_step(strategy, desired, new, old)
    assert (step.new, step.old) == expected


@pytest.mark.parametrize("desired", range(1, 9))
@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), (2, 2), (8, 0)])
def test_a_rollout_ends_and_keeps_within_its_limits(surge, unavailable, desired):
    strategy = rolling(surge, unavailable)
    surge, unavailable = limits(strategy, desired)
    new, old = sized(0), sized(desired, desired)
    for _ in range(4 * desired):
        step = next_step(strategy, desired, new, [old])
        # Every pod becomes available before the next step.
        new, old = sized(step.new, step.new), sized(step.old[0], step.old[0])
        assert desired - unavailable <= new.ready + old.ready
        assert new.wanted + old.wanted <= desired + surge
    assert (new.wanted, old.wanted) == (desired, 0)


def test_what_is_not_played_is_refused():
    with pytest.raises(NotImplementedError, match="by numbers of pods"):
        next_step({"rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}}, 2, sized(0), [])
    with pytest.raises(NotImplementedError, match="Recreate"):
        next_step({"type": "Recreate"}, 2, sized(0), [sized(2, 2)])


def pod(name, *, ready=True, cost=None, created="2026-01-01T00:00:00Z", since="2026-01-01T00:00:10Z", **status):
    annotations = {} if cost is None else {"controller.kubernetes.io/pod-deletion-cost": cost}
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": since}
    return {
        "metadata": {"name": name, "annotations": annotations, "creationTimestamp": created},
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", "conditions": [condition], **status},
    }


def names(pods, count):
    return [each["metadata"]["name"] for each in victims(pods, count)]


def test_the_cheapest_of_the_ready_pods_ends_first():
    pods = [pod("a", cost="10"), pod("b", cost="-3"), pod("c"), pod("d", cost="2")]
    assert names(pods, 4) == ["b", "c", "d", "a"]


def test_pods_that_serve_nobody_end_before_cheap_ones():
    pods = [pod("cheap", cost="-100"), pod("unready", ready=False, cost="100"), pod("pending", phase="Pending")]
    assert names(pods, 3) == ["pending", "unready", "cheap"]


def test_of_equally_cheap_pods_the_one_ready_for_less_time_ends_first():
    pods = [pod("old", since="2026-01-01T00:00:10Z"), pod("young", since="2026-01-01T00:00:20Z")]
    assert names(pods, 1) == ["young"]


def test_then_the_one_that_restarts_more_and_then_the_younger():
    pods = [
        pod("a", created="2026-01-01T00:00:00Z"),
        pod("b", created="2026-01-01T00:00:05Z"),
        pod("c", containerStatuses=[{"restartCount": 2}]),
    ]
    assert names(pods, 3) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), ("-7", -7), ("+7", 0), ("07", 0), ("7.5", 0), ("", 0), ("99999999999", 0)]
)
def test_a_deletion_cost_that_is_no_int32_counts_as_none(text, expected):
    assert deletion_cost(pod("a", cost=text)) == expected
