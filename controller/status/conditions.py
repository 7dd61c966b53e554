"""The conditions of a KVCluster: what is observed, judged. `reasons.py` says what each reason means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from controller.objects.names import Component
from controller.status import raw
from controller.status.freshness import freshness
from controller.status.observed import Observed
from controller.status.pod_problems import pod_troubles, troubles
from controller.status.pods import Trouble, active, state_of
from controller.status.reasons import GIVEN_BY, ConditionType, Reason
from controller.status.workload import Workload, workload

Status = Literal["True", "False", "Unknown"]

MESSAGE_LENGTH = 4096

_PROBLEMS = frozenset({Reason.INVALID_SPEC, Reason.NAME_CONFLICT, Reason.APPLY_FAILED, Reason.MISSING_API})
"""Reasons with one message a finding, all of which matter; of pods that suffer alike one is enough."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition without its history."""

    type: ConditionType
    status: Status
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class _Fleet:
    """What several conditions look at."""

    worker: Workload
    router: Workload
    suffering: tuple[Trouble, ...]
    wrong: Sequence[tuple[Reason, str]]


def conditions(observed: Observed, previous: Sequence[Mapping[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """All conditions, in the order of `ConditionType`. `previous` are those of the last status."""
    earlier = {raw.text(item, "type"): item for item in previous}
    verdicts = judge(observed, [raw.text(item, "message") for item in previous], now)
    return [_with_history(verdict, earlier.get(verdict.type), observed.generation, now) for verdict in verdicts]


def judge(observed: Observed, earlier: Sequence[str], now: datetime) -> list[Verdict]:
    """What each condition is now. `earlier` are the messages of the last status."""
    worker, router = workload(observed, Component.WORKER), workload(observed, Component.ROUTER)
    suffering = pod_troubles(observed, earlier, now)
    fleet = _Fleet(worker, router, suffering, troubles(observed, (worker, router), suffering, now))
    workers, routers = _available(observed, worker, fleet), _available(observed, router, fleet)
    return [
        _ready(fleet, workers, routers),
        workers,
        routers,
        _verdict(ConditionType.CACHE_VIEW_FRESH, *freshness(observed, now)),
        _verdict(ConditionType.PROGRESSING, *_progressing(fleet)),
        _verdict(ConditionType.DEGRADED, *_degraded(fleet.wrong)),
    ]


def _verdict(kind: ConditionType, reason: Reason, message: str) -> Verdict:
    status = next(status for status, reasons in GIVEN_BY[kind].items() if reason in reasons)
    return Verdict(kind, status, reason, message)  # type: ignore[arg-type]


def _with_history(
    verdict: Verdict, earlier: Mapping[str, Any] | None, generation: int, now: datetime
) -> dict[str, Any]:
    since = raw.text(earlier, "lastTransitionTime") if raw.text(earlier, "status") == verdict.status else ""
    return {
        "type": verdict.type.value,
        "status": verdict.status,
        "observedGeneration": generation,
        "lastTransitionTime": since or raw.timestamp(now),
        "reason": verdict.reason.value,
        "message": verdict.message[:MESSAGE_LENGTH],
    }


def _ready(fleet: _Fleet, workers: Verdict, routers: Verdict) -> Verdict:
    if fleet.worker.serving and fleet.router.serving:
        last = [load.component for load in (fleet.worker, fleet.router) if not load.ready]
        how = "".join(f" The last {component} terminates and still serves." for component in last)
        message = f"Requests are answered: {fleet.worker.of}, {fleet.router.of}.{how}"
        return _verdict(ConditionType.READY, Reason.SERVING, message)
    # Routers are not ready without workers, so that is the cause if both are missing.
    cause = workers if not fleet.worker.serving else routers
    return _verdict(ConditionType.READY, cause.reason, f"Requests are not answered: {cause.message}")


def _available(observed: Observed, load: Workload, fleet: _Fleet) -> Verdict:
    kind = ConditionType.WORKERS_AVAILABLE if load.component is Component.WORKER else ConditionType.ROUTER_AVAILABLE
    return _verdict(kind, *_availability(observed, load, fleet))


def _availability(observed: Observed, load: Workload, fleet: _Fleet) -> tuple[Reason, str]:
    if not load.exists:
        return Reason.NOT_CREATED, f"Deployment {load.name} does not exist."
    if load.wanted == 0:
        return Reason.SCALED_TO_ZERO, f"No {load.component} is wanted."
    if load.ready >= load.wanted:
        return Reason.ALL_READY, f"{_capital(load.of)}."
    suffering = next((trouble for trouble in fleet.suffering if trouble.component is load.component), None)
    why = f" {suffering.message}" if suffering is not None else ""
    if load.available_enough:
        return Reason.SOME_READY, f"{load.of}.{why}"
    if suffering is not None:
        return suffering.reason, f"{load.of}.{why}"
    if load.ready:
        return Reason.TOO_FEW_READY, f"{load.of}, at least {load.needed} must be."
    pods = active(observed.pods, load.component)
    if load.component is Component.ROUTER and not fleet.worker.ready and any(_runs(pod) for pod in pods):
        return Reason.WAITING_FOR_WORKERS, f"{load.of}: routers wait until a worker is ready."
    named = f" Pod {raw.name(pods[0])}: {state_of(pods[0])}." if pods else " There are no pods yet."
    return Reason.NONE_READY, f"{load.of}.{named}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _runs(pod: raw.Raw) -> bool:
    return raw.text(pod, "status", "phase") == "Running"


def _progressing(fleet: _Fleet) -> tuple[Reason, str]:
    blocked = [reason.value for reason, _ in fleet.wrong if reason in _PROBLEMS and reason is not Reason.MISSING_API]
    if blocked:
        return Reason.BLOCKED, f"What runs stays as it is until the problem is solved: {blocked[0]}."
    loads = (fleet.worker, fleet.router)
    missing = [load.name for load in loads if not load.exists]
    if missing:
        return Reason.CREATING, f"Deployment {missing[0]} does not exist yet."
    stalled = [load for load in loads if load.stalled]
    if stalled:
        return Reason.STALLED, f"Deployment {stalled[0].name} makes no progress: see Degraded."
    for load in loads:
        if load.updated < min(load.wanted, load.replicas) or load.replicas > load.updated > 0:
            old = load.replicas - load.updated
            return Reason.ROLLING_OUT, f"{load.updated} of {load.wanted} {load.component}s are new, {old} are old."
    for load in loads:
        if load.replicas != load.wanted:
            return Reason.SCALING, f"There are {load.replicas} {load.component}s, {load.wanted} are wanted."
    for load in loads:
        if not load.current:
            return Reason.ROLLING_OUT, f"Deployment {load.name} has just been changed."
    for load in loads:
        if load.available < load.wanted:
            return Reason.STARTING, f"{load.available} of {load.wanted} {load.component}s are available."
    return Reason.COMPLETE, "What runs is what the spec asks for."


def _degraded(wrong: Sequence[tuple[Reason, str]]) -> tuple[Reason, str]:
    if not wrong:
        return Reason.AS_EXPECTED, "Nothing is wrong."
    reason = wrong[0][0]
    alike = [message for each, message in wrong if each is reason]
    shown = alike[: 3 if reason in _PROBLEMS else 1]
    besides = dict.fromkeys(each.value for each, _ in wrong if each is not reason)
    more = f" And {len(alike) - len(shown)} more." if len(alike) > len(shown) else ""
    others = f" Besides: {', '.join(besides)}." if besides else ""
    return reason, f"{' '.join(shown)}{more}{others}"
