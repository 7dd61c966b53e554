"""The fake node's arithmetic of rollouts is Kubernetes' own."""

from __future__ import annotations

import pytest

from tests.kube.kubelet.rollout import Sizes, deletion_cost, int_or_percent, limits, next_step, victims


def rolling(surge: int | str, unavailable: int | str) -> dict[str, object]:
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}


@pytest.mark.parametrize(
    ("strategy", "desired", "expected"),
    [
        ({}, 4, (1, 1)),
        ({}, 2, (1, 0)),
        ({}, 10, (3, 2)),
        (rolling("30%", "30%"), 10, (3, 3)),
        (rolling(0, "10%"), 3, (0, 1)),
        (rolling(0, 0), 3, (0, 1)),
        (rolling(1, 0), 3, (1, 0)),
        (rolling(0, 10), 3, (0, 3)),
        (rolling("100%", "0%"), 3, (3, 0)),
    ],
)
def test_surge_rounds_up_and_unavailable_down(strategy, desired, expected):
    assert limits(strategy, desired) == expected


@pytest.mark.parametrize("value", ["5", "-5%", "5.5%", "", "%"])
def test_neither_a_number_nor_a_percentage(value):
    with pytest.raises(ValueError, match="neither"):
        int_or_percent(value, 4, round_up=True)


@pytest.mark.parametrize(
    ("strategy", "desired", "new", "old", "expected"),
    [
        # First pods of a Deployment; scaling up and down.
        ({}, 3, Sizes(0), [], (3, ())),
        ({}, 5, Sizes(3, 3, 3), [], (5, ())),
        ({}, 1, Sizes(3, 3, 3), [], (1, ())),
        # A rollout begins with what may be added.
        (rolling(1, 0), 2, Sizes(0), [Sizes(2, 2, 2)], (1, (2,))),
        # Nothing is taken away before the new pod is available.
        (rolling(1, 0), 2, Sizes(1, 1, 0), [Sizes(2, 2, 2)], (1, (2,))),
        (rolling(1, 0), 2, Sizes(1, 1, 1), [Sizes(2, 2, 2)], (1, (1,))),
        (rolling(1, 0), 2, Sizes(1, 1, 1), [Sizes(1, 2, 1)], (2, (1,))),
        # Without surge something has to go first.
        (rolling(0, 1), 3, Sizes(0), [Sizes(3, 3, 3)], (0, (2,))),
        (rolling(0, 1), 3, Sizes(0), [Sizes(2, 3, 2)], (1, (2,))),
        # Old pods that serve nobody go even though the new one does not work yet, as far as pods may be missing.
        (rolling(1, 0), 3, Sizes(1, 1, 0), [Sizes(3, 3, 2)], (1, (3,))),
        (rolling(1, 1), 4, Sizes(1, 1, 0), [Sizes(2, 2, 0), Sizes(2, 2, 2)], (1, (1, 2))),
        # The oldest first.
        (rolling(2, 0), 4, Sizes(2, 2, 2), [Sizes(1, 1, 1), Sizes(3, 3, 3)], (2, (0, 2))),
        # Down to nothing.
        (rolling(1, 0), 0, Sizes(2, 2, 2), [], (0, ())),
    ],
)
def test_one_step_of_a_rolling_update(strategy, desired, new, old, expected):
    step = next_step(strategy, desired, new, old)
    assert (step.new, step.old) == expected


@pytest.mark.parametrize("desired", range(1, 9))
@pytest.mark.parametrize("strategy", [{}, rolling(1, 0), rolling(0, 1), rolling("50%", "50%"), rolling("100%", 0)])
def test_a_rollout_ends_and_keeps_within_its_limits(strategy, desired):
    surge, unavailable = limits(strategy, desired)
    new, old = Sizes(0), Sizes(desired, desired, desired)
    for _ in range(4 * desired):
        step = next_step(strategy, desired, new, [old])
        # Every pod becomes available before the next step.
        new, old = Sizes(step.new, step.new, step.new), Sizes(step.old[0], step.old[0], step.old[0])
        assert desired - unavailable <= new.available + old.available
        assert new.wanted + old.wanted <= desired + surge
    assert (new.wanted, old.wanted) == (desired, 0)


def scaled(wanted, desired, most, available=None):
    return Sizes(wanted, wanted, wanted if available is None else available, desired, most)


@pytest.mark.parametrize(
    ("strategy", "desired", "new", "old", "expected"),
    [
        # Nobody else has pods: the one that has some follows, whatever its template.
        ({}, 5, scaled(2, 2, 3), [Sizes(0)], (5, (0,))),
        (rolling(1, 0), 5, Sizes(0), [scaled(2, 2, 3)], (0, (5,))),
        (rolling(1, 0), 0, scaled(2, 2, 3), [], (0, ())),
        # The example of the Kubernetes documentation: 10 -> 15 with 8 old and 5 new pods.
        (rolling(3, 2), 15, scaled(5, 10, 13, 0), [scaled(8, 10, 13)], (7, (11,))),
        # Down in the middle of a rollout; the larger one takes what rounding leaves.
        (rolling(1, 0), 2, scaled(2, 4, 5), [scaled(3, 4, 5)], (1, (2,))),
        (rolling(1, 0), 0, scaled(2, 4, 5), [scaled(3, 4, 5)], (0, (0,))),
    ],
)
def test_a_deployment_that_is_scaled(strategy, desired, new, old, expected):
    step = next_step(strategy, desired, new, old)
    assert (step.new, step.old) == expected


def test_recreate_waits_for_the_last_old_pod():
    strategy = {"type": "Recreate"}
    assert next_step(strategy, 2, Sizes(0), [Sizes(2, 2, 2)]).old == (0,)
    assert next_step(strategy, 2, Sizes(0), [Sizes(0, 1, 0)]).new == 0
    assert next_step(strategy, 2, Sizes(0), [Sizes(0)]).new == 2


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
