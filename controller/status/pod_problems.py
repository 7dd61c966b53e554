"""Everything that is wrong with a cluster and will not pass by itself, the gravest first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from controller.objects.names import Component
from controller.status import raw
from controller.status.observed import Observed, ProblemKind
from controller.status.pods import Trouble, active, pod_trouble, quoted, sharpened
from controller.status.raw import Raw
from controller.status.reasons import GIVEN_BY, ConditionType, Reason
from controller.status.workload import Workload

AUTOSCALER_PATIENCE = timedelta(minutes=2)
"""A new autoscaler has no metric until its pods have been scraped."""

_ORDER = GIVEN_BY[ConditionType.DEGRADED]["True"]


def pod_troubles(observed: Observed, earlier: Sequence[str], now: datetime) -> tuple[Trouble, ...]:
    """What keeps pods from being there: what the Deployments were refused, then what the pods suffer from.

    `earlier` are the messages of the last status.
    """
    found = [trouble for component in Component if (trouble := _refused(observed, component)) is not None]
    for component in Component:
        for pod in active(observed.pods, component):
            trouble = pod_trouble(pod, observed.namespace, now)
            if trouble is not None:
                found.append(sharpened(trouble, earlier))
    return tuple(sorted(found, key=lambda trouble: (_ORDER.index(trouble.reason), trouble.component, trouble.subject)))


def _refused(observed: Observed, component: Component) -> Trouble | None:
    failure = raw.condition(observed.deployments.get(component), "ReplicaFailure")
    if failure.get("status") != "True":
        return None
    said = raw.text(failure, "message")
    over_quota = "exceeded quota" in said
    advice = "Ask for less, or have the namespace's quota raised." if over_quota else "Change what it objects to."
    return Trouble(
        Reason.QUOTA_EXCEEDED if over_quota else Reason.CREATE_REFUSED,
        component,
        f"{observed.name}-{component}",
        f"Deployment {observed.name}-{component} may not create a pod: {quoted(said)} {advice}",
    )


_PROBLEMS = {
    ProblemKind.INVALID_SPEC: Reason.INVALID_SPEC,
    ProblemKind.NAME_CONFLICT: Reason.NAME_CONFLICT,
    ProblemKind.APPLY_FAILED: Reason.APPLY_FAILED,
    ProblemKind.MISSING_API: Reason.MISSING_API,
}


def troubles(
    observed: Observed, workloads: Sequence[Workload], of_pods: Sequence[Trouble], now: datetime
) -> list[tuple[Reason, str]]:
    """All of it, in the order of precedence: reason and message."""
    found = [
        (_PROBLEMS[problem.kind], f"{problem.object}: {problem.message}" if problem.object else problem.message)
        for problem in observed.problems
    ]
    found += [(trouble.reason, trouble.message) for trouble in of_pods]
    found += [(Reason.STALLED, f"Deployment {each.name}: {quoted(each.stalled)}") for each in workloads if each.stalled]
    if observed.autoscaler is not None and (said := _autoscaler(observed.autoscaler, now)):
        found.append((Reason.AUTOSCALER_FAILING, said))
    return sorted(found, key=lambda item: _ORDER.index(item[0]))


def _autoscaler(autoscaler: Raw, now: datetime) -> str:
    """Why the autoscaler does not do its work; empty when it does, or has not had the time to."""
    kind = raw.text(autoscaler, "kind") or "HorizontalPodAutoscaler"
    for each in ("Ready",) if kind == "ScaledObject" else ("AbleToScale", "ScalingActive"):
        condition = raw.condition(autoscaler, each)
        # ScalingDisabled: someone scaled to zero by hand, which an HPA leaves alone.
        if condition.get("status") != "False" or condition.get("reason") == "ScalingDisabled":
            continue
        since = raw.when(condition.get("lastTransitionTime") or raw.at(autoscaler, "metadata", "creationTimestamp"))
        if since is None or now - since >= AUTOSCALER_PATIENCE:
            reason = raw.text(condition, "reason")
            return f"{kind} {raw.name(autoscaler)} ({reason or each}): {quoted(raw.text(condition, 'message'))}"
    return ""
