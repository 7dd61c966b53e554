"""Rolling updates: sizes of ReplicaSets, which pods go first, what the status says. Kubernetes' own arithmetic, pure.

Played: `pkg/controller/deployment` (one call of `next_step` is one step; the next one follows when the cluster has
changed), the order in which `ActivePodsWithRanks` ends pods (deletion costs included), conditions and counts of the
status. Checked by `test_rollout.py` and `test_pod_states.py` against what those rules say.

Not played, and refused: percentages, minReadySeconds, updates with the strategy Recreate. A Deployment that is scaled
during an update shares the difference among its ReplicaSets in a real cluster, and goes on by the same steps here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
_COST = re.compile(r"0|-?[1-9]\d{0,9}")
_PHASES = {"Pending": 0, "Unknown": 1}

COUNTS = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas", "unavailableReplicas")
CREATED = "NewReplicaSetCreated"
COMPLETE = "NewReplicaSetAvailable"


@dataclass(frozen=True, slots=True)
class Counted:
    """Pods of one ReplicaSet: wanted, there (not ending), and ready, which is available at once."""

    wanted: int = 0
    active: int = 0
    ready: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes after the next step; `old` in the order they were given."""

    new: int
    old: tuple[int, ...]


def limits(strategy: Mapping[str, Any], desired: int) -> tuple[int, int]:
    """(maxSurge, maxUnavailable) in pods, never both zero in a rolling update. Raises `NotImplementedError`."""
    if strategy.get("type") == "Recreate":
        return 0, 0
    rolling = strategy.get("rollingUpdate") or {}
    surge, unavailable = rolling.get("maxSurge"), rolling.get("maxUnavailable")
    if not isinstance(surge, int) or not isinstance(unavailable, int):
        raise NotImplementedError(f"the fake node plays rolling updates by numbers of pods, not {strategy}")
    return surge, min(unavailable if surge else max(unavailable, 1), desired)


def next_step(strategy: Mapping[str, Any], desired: int, new: Counted, old: Sequence[Counted]) -> Step:
    """What to scale now. `old` are the ReplicaSets of earlier templates, oldest first. Raises `NotImplementedError`."""
    if strategy.get("type") == "Recreate" and any(each.wanted for each in old):
        raise NotImplementedError("the fake node plays no update of a Deployment with the strategy Recreate")
    surge, unavailable = limits(strategy, desired)
    unchanged = tuple(each.wanted for each in old)
    if new.wanted >= desired:
        size = desired
    else:
        room = desired + surge - new.wanted - sum(unchanged)
        size = new.wanted + min(max(room, 0), desired - new.wanted)
    if size != new.wanted:
        return Step(size, unchanged)
    return Step(size, _shrunk(desired - unavailable, new, old))


def _shrunk(least: int, new: Counted, old: Sequence[Counted]) -> tuple[int, ...]:
    """Sizes of the old ReplicaSets: first their pods that serve nobody go, then what can be spared."""
    sizes = [each.wanted for each in old]
    starting = new.wanted - new.ready
    spare = new.wanted + sum(sizes) - least - starting
    if spare <= 0:
        return tuple(sizes)
    for index, each in enumerate(old):
        useless = min(spare, max(sizes[index] - each.ready, 0))
        sizes[index] -= useless
        spare -= useless
    spare = new.ready + sum(each.ready for each in old) - least
    for index in range(len(sizes)):
        fewer = min(sizes[index], max(spare, 0))
        sizes[index] -= fewer
        spare -= fewer
    return tuple(sizes)


def condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of this type; empty when there is none."""
    found: Mapping[str, Any] = next((each for each in status.get("conditions") or () if each["type"] == kind), {})
    return found


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod's condition Ready is True."""
    return condition(pod.get("status", {}), "Ready").get("status") == "True"


def is_active(pod: Mapping[str, Any]) -> bool:
    """Whether a ReplicaSet counts the pod: it has not ended and was not told to."""
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return not ended and "deletionTimestamp" not in pod["metadata"]


def deletion_cost(pod: Mapping[str, Any]) -> int:
    """What the pod's annotation says; 0 where it says nothing that Kubernetes understands."""
    text = (pod["metadata"].get("annotations") or {}).get(DELETION_COST, "0")
    value = int(text) if _COST.fullmatch(text) else 0
    return value if -(2**31) <= value < 2**31 else 0


def victims(pods: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The pods that end when `count` must: unscheduled, not running, not ready, cheap, young ones first."""
    ordered = sorted(pods, key=lambda pod: pod["metadata"]["name"])
    # Stable sorts, from the least important criterion to the most important one.
    ordered.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), reverse=True)
    ordered.sort(key=_restarts, reverse=True)
    ordered.sort(key=lambda pod: _ready_since(pod) if is_ready(pod) else "", reverse=True)
    ordered.sort(key=_rank)
    return ordered[:count]


def _rank(pod: Mapping[str, Any]) -> tuple[bool, int, bool, int]:
    phase = pod.get("status", {}).get("phase", "Pending")
    return bool(pod["spec"].get("nodeName")), _PHASES.get(phase, 2), is_ready(pod), deletion_cost(pod)


def _ready_since(pod: Mapping[str, Any]) -> str:
    return str(condition(pod["status"], "Ready").get("lastTransitionTime", ""))


def _restarts(pod: Mapping[str, Any]) -> int:
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    return max((each.get("restartCount", 0) for each in statuses), default=0)


def replica_set_status(replica_set: Mapping[str, Any], counted: Counted, failure: str, now: str) -> dict[str, Any]:
    """The status of a ReplicaSet; zeros are there, so that a merge patch overwrites what they replace."""
    present = replica_set.get("status", {})
    return {
        "replicas": counted.active,
        "fullyLabeledReplicas": counted.active,
        "readyReplicas": counted.ready,
        "availableReplicas": counted.ready,
        "observedGeneration": replica_set["metadata"].get("generation", 1),
        # A ReplicaSet's conditions have no time of their last update.
        "conditions": [_without_update(each) for each in _failure(present, failure, now)],
    }


def deployment_status(
    deployment: Mapping[str, Any],
    new: Counted,
    old: Sequence[Counted],
    *,
    created: bool,
    failure: str,
    overdue: bool,
    now: str,
) -> dict[str, Any]:
    """The status of a Deployment: all its counts together, and its conditions.

    `created`: the newest ReplicaSet has just been made. `failure`: why pods cannot be created. `overdue`: there was
    no progress within progressDeadlineSeconds.
    """
    every = [new, *old]
    present, desired = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    available = sum(each.ready for each in every)
    counts = {
        "replicas": sum(each.active for each in every),
        "updatedReplicas": new.active,
        "readyReplicas": available,
        "availableReplicas": available,
        "unavailableReplicas": max(sum(each.wanted for each in every) - available, 0),
    }
    reason, status = _progress(present, counts, desired, created=created, overdue=overdue)
    enough = available >= desired - limits(deployment["spec"].get("strategy") or {}, desired)[1]
    conditions = [
        _condition(
            present,
            "Available",
            "True" if enough else "False",
            "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
            f"Deployment {'has' if enough else 'does not have'} minimum availability.",
            now,
        ),
        _condition(present, "Progressing", status, reason, _progress_message(reason, new.name), now),
        *_failure(present, failure, now),
    ]
    return {"observedGeneration": deployment["metadata"].get("generation", 1), **counts, "conditions": conditions}


def progressed(present: Mapping[str, Any], counts: Mapping[str, int]) -> bool:
    """Whether these counts are nearer to the end of a rollout than the present ones."""

    def old(status: Mapping[str, Any]) -> int:
        return int(status.get("replicas", 0) - status.get("updatedReplicas", 0))

    more = any(
        counts[field] > present.get(field, 0) for field in ("updatedReplicas", "readyReplicas", "availableReplicas")
    )
    return more or old(counts) < old(present)


def is_complete(counts: Mapping[str, Any], desired: int) -> bool:
    """Whether every pod is of the newest template and available."""
    fields = ("updatedReplicas", "replicas", "availableReplicas")
    return all(counts.get(field, 0) == desired for field in fields)


def _progress(
    present: Mapping[str, Any], counts: Mapping[str, int], desired: int, *, created: bool, overdue: bool
) -> tuple[str, str]:
    """(reason, status) of the condition Progressing."""
    before = condition(present, "Progressing")
    if created:
        return CREATED, "True"
    if before.get("reason") == COMPLETE and counts["replicas"] == counts["updatedReplicas"]:
        # Once a rollout is complete, pods that die or are added are not called progress any more.
        return COMPLETE, "True"
    if is_complete(counts, desired):
        return COMPLETE, "True"
    if progressed(present, counts):
        return "ReplicaSetUpdated", "True"
    if overdue:
        return "ProgressDeadlineExceeded", "False"
    if before.get("reason") == CREATED and counts["updatedReplicas"]:
        return "ReplicaSetUpdated", "True"
    return before.get("reason", "ReplicaSetUpdated"), before.get("status", "True")


def _progress_message(reason: str, name: str) -> str:
    return {
        CREATED: f'Created new replica set "{name}"',
        COMPLETE: f'ReplicaSet "{name}" has successfully progressed.',
        "ProgressDeadlineExceeded": f'ReplicaSet "{name}" has timed out progressing.',
    }.get(reason, f'ReplicaSet "{name}" is progressing.')


def _without_update(shown: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in shown.items() if field != "lastUpdateTime"}


def _failure(present: Mapping[str, Any], message: str, now: str) -> list[dict[str, Any]]:
    if not message:
        return []
    return [_condition(present, "ReplicaFailure", "True", "FailedCreate", message, now)]


def _condition(
    present: Mapping[str, Any], kind: str, status: str, reason: str, message: str, now: str
) -> dict[str, Any]:
    before = condition(present, kind)
    said = {"type": kind, "status": status, "reason": reason, "message": message}
    if all(before.get(key) == value for key, value in said.items()):
        return dict(before)
    since = before.get("lastTransitionTime", now) if before.get("status") == status else now
    return {**said, "lastUpdateTime": now, "lastTransitionTime": since}
