"""The conditions of a KVCluster, evaluated from what was observed. `reasons.py` says what each reason means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from controller.objects.names import Component
from controller.status import adapters, external, gateway, raw
from controller.status.observed import Observed, ready_reports
from controller.status.pod_problems import PodProblem, as_sentence, pod_problems
from controller.status.pods import active, is_ready, is_running, ready_for, state_of
from controller.status.raw import Raw
from controller.status.reasons import GIVEN_BY, RECONCILE_PROBLEMS, SEVERITY, ConditionReason, ConditionType, Finding
from controller.status.report import RouterReport
from controller.status.workload import Workload, count, workload

MESSAGE_LENGTH = 4096
FRESH_SECONDS = 5
"""A view that was confirmed longer ago counts as stale."""
SETTLING = timedelta(seconds=FRESH_SECONDS)
"""Routers need not know a worker before it has been ready for so long."""
AUTOSCALER_PATIENCE = timedelta(minutes=2)
"""A new autoscaler has no metric until its pods have been scraped."""

_BLOCKING = frozenset(RECONCILE_PROBLEMS) - {ConditionReason.MISSING_API}
"""Reasons why the spec as a whole is not brought about. A missing API keeps back the one object that needs it."""
_NOT_FRESH = GIVEN_BY[ConditionType.CACHE_VIEW_FRESH]["False"]
"""Of the routers' findings the first of these is given."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as it is now, without its history."""

    type: ConditionType
    reason: ConditionReason
    message: str

    @property
    def status(self) -> str:
        """`True`, `False` or `Unknown`."""
        return next(status for status, reasons in GIVEN_BY[self.type].items() if self.reason in reasons)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What several conditions rest on."""

    observed: Observed
    worker: Workload
    router: Workload
    pod_problems: tuple[PodProblem, ...]
    findings: Sequence[Finding]
    """Everything that is wrong, the gravest first."""

    @property
    def workloads(self) -> tuple[Workload, Workload]:
        return self.worker, self.router


def conditions(observed: Observed, previous: Sequence[Mapping[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """All conditions as in the status, in the order of `ConditionType`. `previous` are those of the last status."""
    earlier = {raw.text(item, "type"): item for item in previous}
    found = evaluate(observed, [raw.text(item, "message") for item in previous], now)
    return [_with_history(condition, earlier.get(condition.type), observed.generation, now) for condition in found]


def evaluate(observed: Observed, earlier: Sequence[str], now: datetime) -> list[Condition]:
    """What each condition is now. `earlier` are the messages of the last status."""
    worker, router = workload(observed, Component.WORKER), workload(observed, Component.ROUTER)
    problems = pod_problems(observed, earlier, now)
    found = sorted(
        _findings(observed, (worker, router), problems, now), key=lambda finding: SEVERITY.index(finding.reason)
    )
    evidence = _Evidence(observed, worker, router, problems, found)
    workers = Condition(ConditionType.WORKERS_AVAILABLE, *_availability(evidence, worker))
    routers = Condition(ConditionType.ROUTER_AVAILABLE, *_availability(evidence, router))
    fresh = Condition(ConditionType.CACHE_VIEW_FRESH, *_freshness(observed, now))
    return [
        Condition(ConditionType.READY, *_ready(evidence, workers, routers)),
        workers,
        routers,
        fresh,
        *_adapters_ready(observed, fresh),
        *_gateway_accepted(observed),
        Condition(ConditionType.PROGRESSING, *_progressing(evidence)),
        Condition(ConditionType.DEGRADED, *_degraded(evidence.findings)),
    ]


def _with_history(
    condition: Condition, earlier: Mapping[str, Any] | None, generation: int, now: datetime
) -> dict[str, Any]:
    since = raw.text(earlier, "lastTransitionTime") if raw.text(earlier, "status") == condition.status else ""
    return {
        "type": condition.type.value,
        "status": condition.status,
        "observedGeneration": generation,
        "lastTransitionTime": since or raw.timestamp(now),
        "reason": condition.reason.value,
        "message": condition.message[:MESSAGE_LENGTH],
    }


def _ready(evidence: _Evidence, workers: Condition, routers: Condition) -> Finding:
    worker, router = evidence.workloads
    if worker.serving and router.serving:
        last = [load.component for load in evidence.workloads if not load.ready]
        how = "".join(f" The last {component} terminates and still serves." for component in last)
        message = f"Requests are answered: {worker.ready_summary}, {router.ready_summary}.{how}"
        return Finding(ConditionReason.SERVING, message)
    if router.serving and worker.exists and _holds(evidence):
        return Finding(ConditionReason.HOLDING, f"Routers hold requests until a worker is ready: {workers.message}")
    # Routers are not ready without workers, so missing workers are the cause when both are missing.
    cause = workers if not worker.serving and workers.status != "Unknown" else routers
    if cause.status == "True":  # a router is ready only with a worker
        return Finding(ConditionReason.SERVING, f"Requests are answered: {router.ready_summary}. {workers.message}")
    return Finding(cause.reason, f"Requests are not answered: {cause.message}")


def _holds(evidence: _Evidence) -> bool:
    """Whether requests wait for a worker that will come: the spec scales to zero, and nothing is known to prevent
    it."""
    spec = evidence.observed.spec
    prevented = any(each.component is Component.WORKER for each in evidence.pod_problems)
    return spec is not None and spec.scales_to_zero and not prevented


def _availability(evidence: _Evidence, load: Workload) -> Finding:
    foreign = evidence.observed.external and load.component is Component.WORKER
    if foreign and (missing := external.unavailability(evidence.observed)) is not None:
        return missing
    if not load.exists:
        return Finding(ConditionReason.NOT_CREATED, f"Deployment {load.name} does not exist.")
    if load.wanted == 0:
        return Finding(ConditionReason.SCALED_TO_ZERO, f"No {load.component} is wanted.")
    if load.ready >= load.wanted:
        return Finding(ConditionReason.ALL_READY, f"{load.ready_summary}.")
    problem = next((each for each in evidence.pod_problems if each.component is load.component), None)
    why = f" {problem.message}" if problem is not None else ""
    if load.available_enough:
        return Finding(ConditionReason.SOME_READY, f"{load.ready_summary}.{why}")
    if problem is not None:
        return Finding(problem.reason, f"{load.ready_summary}.{why}")
    if load.ready:
        return Finding(ConditionReason.TOO_FEW_READY, f"{load.ready_summary}, at least {load.needed} must be.")
    pods = active(evidence.observed.pods, load.component)
    if load.component is Component.ROUTER and not evidence.worker.ready and any(map(is_running, pods)):
        message = f"{load.ready_summary}: routers wait until a worker is ready."
        return Finding(ConditionReason.WAITING_FOR_WORKERS, message)
    named = f" Pod {raw.name(pods[0])}: {state_of(pods[0])}." if pods else " There are no pods yet."
    return Finding(ConditionReason.NONE_READY, f"{load.ready_summary}.{named}")


def _progressing(evidence: _Evidence) -> Finding:
    blocked = [finding.reason.value for finding in evidence.findings if finding.reason in _BLOCKING]
    if blocked:
        message = f"What runs stays as it is until the problem is solved: {blocked[0]}."
        return Finding(ConditionReason.BLOCKED, message)
    loads = evidence.workloads if not evidence.observed.external else (evidence.router,)
    for load in loads:
        if not load.exists:
            return Finding(ConditionReason.CREATING, f"Deployment {load.name} does not exist yet.")
    for load in loads:
        if load.stalled:
            return Finding(ConditionReason.STALLED, f"Deployment {load.name} makes no progress: see Degraded.")
    for load in loads:
        if load.updated < min(load.wanted, load.replicas) or load.replicas > load.updated > 0:
            old = load.replicas - load.updated
            message = f"{load.updated} of {load.wanted} {load.component}s are new, {old} are old."
            return Finding(ConditionReason.ROLLING_OUT, message)
    for load in loads:
        if load.replicas != load.wanted:
            message = f"There are {load.replicas} {load.component}s, {load.wanted} are wanted."
            return Finding(ConditionReason.SCALING, message)
    for load in loads:
        if not load.current:
            return Finding(ConditionReason.ROLLING_OUT, f"Deployment {load.name} has just been changed.")
    for load in loads:
        if load.available < load.wanted:
            message = f"{load.available} of {load.wanted} {load.component}s are available."
            return Finding(ConditionReason.STARTING, message)
    return Finding(ConditionReason.COMPLETE, "What runs is what the spec asks for.")


def _freshness(observed: Observed, now: datetime) -> Finding:
    """Reason and message of CacheViewFresh."""
    pods = [pod for pod in active(observed.pods, Component.WORKER) if is_ready(pod)]
    workers = workload(observed, Component.WORKER).ready if observed.external else len(pods)
    routers = [raw.name(pod) for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
    if not workers:
        return Finding(ConditionReason.NO_WORKERS, "No worker is ready.")
    if not routers:
        return Finding(ConditionReason.NO_ROUTER, "No router is ready.")
    reports = {name: observed.routers.reports[name] for name in routers if name in observed.routers.reports}
    settled = sum(1 for pod in pods if (since := ready_for(pod, now)) is not None and since >= SETTLING)
    findings = [
        finding
        for name, report in reports.items()
        if (finding := _view_finding(name, report, report.workers_ready if observed.external else settled)) is not None
    ]
    if findings:
        return min(findings, key=lambda finding: _NOT_FRESH.index(finding.reason))
    for name in routers:
        if (error := observed.routers.errors.get(name)) is not None:
            message = f"Router {name} could not be asked: {as_sentence(error)}"
            return Finding(ConditionReason.ROUTER_UNREACHABLE, message)
    if not reports:
        return Finding(ConditionReason.ROUTER_UNREACHABLE, "No router has been asked yet.")
    # A router that has just become ready is asked the next time; until then the others speak for it.
    if history := max((report.workers_history for report in reports.values()), default=0):
        message = (
            f"{history} of {count(workers, 'worker')} tell nothing of their caches: prompts are matched against what "
            "each router has sent there. An agent beside each engine (docs/vllm.md) would give exact views."
        )
        return Finding(ConditionReason.OWN_HISTORY, message)
    message = f"Every router matches prompts against {_all_workers(workers)}."
    return Finding(ConditionReason.FRESH, message)


def _adapters_ready(observed: Observed, fresh: Condition) -> list[Condition]:
    """AdaptersReady, where the spec lists adapters. The routers tell of these too, so it is unknown when they tell
    nothing of the views."""
    if observed.spec is None or not observed.spec.model.adapters:
        return []
    listed = adapters.figures(observed.spec, ready_reports(observed))
    known = fresh.status != "Unknown" and listed and listed[0].ready
    finding = adapters.readiness(listed) if known else Finding(fresh.reason, fresh.message)
    if not known and fresh.status != "Unknown":
        finding = Finding(ConditionReason.NO_WORKERS, "No router reports a ready worker.")
    return [Condition(ConditionType.ADAPTERS_READY, *finding)]


def _gateway_accepted(observed: Observed) -> list[Condition]:
    """GatewayAccepted, where the spec asks for an InferencePool."""
    finding = gateway.acceptance(observed)
    return [] if finding is None else [Condition(ConditionType.GATEWAY_ACCEPTED, *finding)]


def _all_workers(workers: int) -> str:
    return "the only worker" if workers == 1 else f"all {count(workers, 'worker')}"


def _view_finding(router: str, report: RouterReport, settled: int) -> Finding | None:
    if report.draining:
        return None
    if not report.discovery.healthy:
        return Finding(
            ConditionReason.DISCOVERY_STALE,
            f"Router {router} no longer learns which workers exist, and serves with its last list: "
            f"{as_sentence(report.discovery.error)}",
        )
    if report.workers_ready < settled:
        return Finding(
            ConditionReason.WORKERS_MISSING,
            f"Router {router} has {report.workers_ready} of {count(settled, 'ready worker')} to choose from; "
            "kvcluster explain shows what it reports about each.",
        )
    if report.tokenizer.state in ("loading", "failed"):
        why = as_sentence(report.tokenizer.error) if report.tokenizer.error else "it is still being loaded"
        return Finding(
            ConditionReason.NO_TOKENIZER,
            f"Router {router} sends requests by load alone, since its tokenizer (spec.model.tokenizer) is not there, "
            f"and keeps trying to load it: {why}",
        )
    if report.view_age_seconds is not None and report.view_age_seconds > FRESH_SECONDS:
        return Finding(
            ConditionReason.STALE,
            f"Router {router} has heard nothing of a worker's cache for more than {FRESH_SECONDS} s, and matches "
            f"prompts against {report.workers_matching} of {count(report.workers_ready, 'worker')}: the rest get "
            "requests by load alone until their feeds are back. kvcluster explain names them.",
        )
    if report.workers_matching + report.workers_history < settled:
        return Finding(
            ConditionReason.MISMATCH,
            f"Router {router} matches prompts against {report.workers_matching} of {count(settled, 'ready worker')}, "
            "and sends requests to the rest by load alone: they serve another model, block size or tokenizer, or no "
            "cache feed. kvcluster explain names them.",
        )
    return None


def _degraded(findings: Sequence[Finding]) -> Finding:
    if not findings:
        return Finding(ConditionReason.AS_EXPECTED, "Nothing is wrong.")
    reason = findings[0].reason
    alike = [finding.message for finding in findings if finding.reason is reason]
    # Reconcile problems differ from one another. Of pods with the same problem one is enough.
    shown = alike[: 3 if reason in RECONCILE_PROBLEMS else 1]
    besides = dict.fromkeys(finding.reason.value for finding in findings if finding.reason is not reason)
    more = f" And {len(alike) - len(shown)} more." if len(alike) > len(shown) else ""
    others = f" Besides: {', '.join(besides)}." if besides else ""
    return Finding(reason, f"{' '.join(shown)}{more}{others}")


def _findings(
    observed: Observed, workloads: Sequence[Workload], of_pods: Sequence[PodProblem], now: datetime
) -> Iterator[Finding]:
    """Everything that is wrong with the cluster and will not pass by itself."""
    for problem in observed.problems:
        message = f"{problem.object}: {problem.message}" if problem.object else problem.message
        if observed.spec is not None and observed.spec.scales_to_zero and problem.object.startswith("ScaledObject/"):
            message += (
                "; spec.autoscaling.min: 0 needs KEDA. The number of workers stays as it is until it is installed"
            )
        yield Finding(problem.reason, message)
    for each in of_pods:
        yield Finding(each.reason, each.message)
    for load in workloads:
        if load.stalled:
            yield Finding(ConditionReason.STALLED, f"Deployment {load.name}: {as_sentence(load.stalled)}")
    if observed.spec is not None:
        yield from adapters.refusals(adapters.figures(observed.spec, ready_reports(observed)))
    if observed.autoscaler is not None and (message := _autoscaler_failure(observed.autoscaler, now)):
        yield Finding(ConditionReason.AUTOSCALER_FAILING, message)


def _autoscaler_failure(autoscaler: Raw, now: datetime) -> str:
    """Why the autoscaler does not work; empty when it does, or has not had time to."""
    kind = raw.text(autoscaler, "kind") or "HorizontalPodAutoscaler"
    for each in ("Ready",) if kind == "ScaledObject" else ("AbleToScale", "ScalingActive"):
        condition = raw.condition(autoscaler, each)
        # ScalingDisabled: someone scaled to zero by hand, and an HPA leaves that alone.
        if condition.get("status") != "False" or condition.get("reason") == "ScalingDisabled":
            continue
        since = raw.when(condition.get("lastTransitionTime") or raw.at(autoscaler, "metadata", "creationTimestamp"))
        if since is None or now - since >= AUTOSCALER_PATIENCE:
            reason = raw.text(condition, "reason")
            return f"{kind} {raw.name(autoscaler)} ({reason or each}): {as_sentence(raw.text(condition, 'message'))}"
    return ""
