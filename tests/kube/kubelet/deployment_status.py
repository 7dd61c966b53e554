"""The status of a Deployment and of its ReplicaSets: pure functions of what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.kubelet.rollout import condition, max_unavailable

COUNTS = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas", "unavailableReplicas")
CREATED = "NewReplicaSetCreated"
COMPLETE = "NewReplicaSetAvailable"


@dataclass(frozen=True, slots=True)
class Counted:
    """Pods of one ReplicaSet: wanted, there (not ending), ready, and ready for minReadySeconds."""

    name: str
    wanted: int = 0
    active: int = 0
    ready: int = 0
    available: int = 0


def replica_set_status(replica_set: Mapping[str, Any], counted: Counted, failure: str, now: str) -> dict[str, Any]:
    """The status of a ReplicaSet; zeros are there, so that a merge patch overwrites what they replace."""
    present = replica_set.get("status", {})
    return {
        "replicas": counted.active,
        "fullyLabeledReplicas": counted.active,
        "readyReplicas": counted.ready,
        "availableReplicas": counted.available,
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
    available = sum(each.available for each in every)
    counts = {
        "replicas": sum(each.active for each in every),
        "updatedReplicas": new.active,
        "readyReplicas": sum(each.ready for each in every),
        "availableReplicas": available,
        "unavailableReplicas": max(sum(each.wanted for each in every) - available, 0),
    }
    reason, status = _progress(present, counts, desired, created=created, overdue=overdue)
    enough = available >= desired - max_unavailable(deployment["spec"].get("strategy") or {}, desired)
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
