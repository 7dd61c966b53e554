"""The condition CacheViewFresh: what the routers know of the workers' caches, and how old their knowledge is."""

from __future__ import annotations

from datetime import datetime, timedelta

from controller.objects.names import Component
from controller.status import raw
from controller.status.observed import Observed
from controller.status.pod_problems import as_sentence
from controller.status.pods import active, is_ready, ready_for
from controller.status.reasons import GIVEN_BY, ConditionReason, ConditionType, Finding
from controller.status.report import RouterReport
from controller.status.workload import count

FRESH_SECONDS = 5
"""A view that was confirmed longer ago counts as stale."""
SETTLING = timedelta(seconds=FRESH_SECONDS)
"""Routers need not know a worker before it has been ready for so long."""

_PRECEDENCE = GIVEN_BY[ConditionType.CACHE_VIEW_FRESH]["False"]


def freshness(observed: Observed, now: datetime) -> Finding:
    """Reason and message of CacheViewFresh."""
    workers = [pod for pod in active(observed.pods, Component.WORKER) if is_ready(pod)]
    routers = [raw.name(pod) for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
    if not workers:
        return Finding(ConditionReason.NO_WORKERS, "No worker is ready.")
    if not routers:
        return Finding(ConditionReason.NO_ROUTER, "No router is ready.")
    reports = {name: observed.routers.reports[name] for name in routers if name in observed.routers.reports}
    settled = sum(1 for pod in workers if (since := ready_for(pod, now)) is not None and since >= SETTLING)
    findings = [finding for name, report in reports.items() if (finding := _finding(name, report, settled)) is not None]
    if findings:
        return min(findings, key=lambda finding: _PRECEDENCE.index(finding.reason))
    for name in routers:
        if (error := observed.routers.errors.get(name)) is not None:
            message = f"Router {name} could not be asked: {as_sentence(error)}"
            return Finding(ConditionReason.ROUTER_UNREACHABLE, message)
    if not reports:
        return Finding(ConditionReason.ROUTER_UNREACHABLE, "No router has been asked yet.")
    # A router that has just become ready is asked the next time; until then the others speak for it.
    message = f"Every router matches prompts against {_all_workers(len(workers))}."
    return Finding(ConditionReason.FRESH, message)


def _all_workers(workers: int) -> str:
    return "the only worker" if workers == 1 else f"all {count(workers, 'worker')}"


def _finding(router: str, report: RouterReport, settled: int) -> Finding | None:
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
    if report.workers_matching < settled:
        return Finding(
            ConditionReason.MISMATCH,
            f"Router {router} matches prompts against {report.workers_matching} of {count(settled, 'ready worker')}, "
            "and sends requests to the rest by load alone: they serve another model, block size or tokenizer, or no "
            "cache feed. kvcluster explain names them.",
        )
    return None
