"""The page as a value, made from what was gathered: for the terminal and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from controller.objects.names import Component
from controller.status import raw
from controller.status.compute import hit_rate_permille, percent
from controller.status.pod_problems import find_pod_problem
from controller.status.pods import active, component_of, containers, is_ready, state_of
from controller.status.report import RecentDecision, RouterReport
from kvcluster.explain.gather import Gathered, RouterAnswer
from kvcluster.explain.workers import ForeignWorkerRow, WorkerFigures, figures_of_pod, foreign_workers

EVENTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class ConditionRow:
    """A condition of the KVCluster."""

    type: str
    status: str
    reason: str
    message: str
    seconds: float | None
    """Since its status changed."""
    good: bool | None
    """Whether that is as it should be; None for neither good nor bad."""


@dataclass(frozen=True, slots=True)
class PodRow:
    """A pod of the cluster."""

    name: str
    role: str
    state: str
    ready: bool
    restarts: int
    age_seconds: float | None
    node: str
    worker: WorkerFigures | None = None


@dataclass(frozen=True, slots=True)
class RouterRow:
    """A router and its report."""

    pod: str
    report: RouterReport | None
    error: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event about the KVCluster, or a warning about one of its objects."""

    type: str
    reason: str
    object: str
    message: str
    count: int
    seconds: float | None
    """Since it was last seen."""


@dataclass(frozen=True, slots=True)
class Page:
    """The whole page."""

    name: str
    namespace: str
    server: str
    strategy: str
    endpoint: str
    hit_rate: str
    """Empty before the first request."""
    view_age_seconds: float | None
    wanted: dict[str, int | None]
    """How many pods of each component are wanted."""
    conditions: tuple[ConditionRow, ...]
    problems: tuple[str, ...]
    """What is wrong and what to do."""
    pods: tuple[PodRow, ...]
    foreign: tuple[ForeignWorkerRow, ...]
    """Workers that are no pods of this KVCluster. Empty where its pods could not be read."""
    routers: tuple[RouterRow, ...]
    events: tuple[EventRow, ...]
    unread: tuple[str, ...]
    """What could not be read, and why."""


def page(gathered: Gathered, now: datetime) -> Page:
    """The page from what was gathered at `now`, an aware datetime."""
    cluster = gathered.cluster
    reports = [router.report for router in gathered.routers if router.report is not None]
    rate = hit_rate_permille(reports, None)
    ages = [report.view_age_seconds for report in reports if report.view_age_seconds is not None]
    pods = tuple(_pod(pod, gathered.routers, now) for pod in sorted(gathered.pods, key=_routers_first))
    foreign = tuple(foreign_workers(gathered)) if gathered.pods else ()
    conditions = tuple(_condition(item, now) for item in raw.objects(cluster, "status", "conditions"))
    return Page(
        name=raw.name(cluster),
        namespace=gathered.namespace,
        server=gathered.server,
        strategy=raw.text(cluster, "status", "strategy") or next((report.strategy for report in reports), ""),
        endpoint=raw.text(cluster, "status", "endpoint"),
        hit_rate=raw.text(cluster, "status", "hitRate") if rate is None else percent(rate),
        view_age_seconds=max(ages) if ages else raw.at(cluster, "status", "cache", "viewAgeSeconds"),
        wanted={component.value: raw.at(cluster, "status", f"{component}s", "wanted") for component in Component},
        conditions=conditions,
        problems=_distinct(
            [
                *_status_problems(cluster),
                *_condition_problems(conditions),
                *_pod_problems(gathered, now),
                *_worker_problems(pods, foreign),
                *_router_problems(gathered.routers),
            ]
        ),
        pods=pods,
        foreign=foreign,
        routers=tuple(RouterRow(router.pod, router.report, router.error) for router in gathered.routers),
        events=_events(gathered.events, now),
        unread=gathered.unread,
    )


def _since(value: object, now: datetime) -> float | None:
    then = raw.when(value)
    return None if then is None else max(0.0, (now - then).total_seconds())


def _condition(item: raw.Raw, now: datetime) -> ConditionRow:
    kind, status = raw.text(item, "type"), raw.text(item, "status")
    good: bool | None
    if kind == "Progressing" or status == "Unknown":
        good = None
    else:
        good = (status == "False") if kind == "Degraded" else (status == "True")
    return ConditionRow(
        kind,
        status,
        raw.text(item, "reason"),
        raw.text(item, "message"),
        _since(item.get("lastTransitionTime"), now),
        good,
    )


# --- pods ---


def _routers_first(pod: raw.Raw) -> tuple[str, str]:
    return component_of(pod), raw.name(pod)


def _pod(pod: raw.Raw, routers: Sequence[RouterAnswer], now: datetime) -> PodRow:
    role = component_of(pod)
    return PodRow(
        name=raw.name(pod),
        role=role,
        state=state_of(pod),
        ready=is_ready(pod),
        restarts=sum(raw.number(status, "restartCount") for status in containers(pod)),
        age_seconds=_since(raw.at(pod, "metadata", "creationTimestamp"), now),
        node=raw.text(pod, "spec", "nodeName"),
        worker=figures_of_pod(pod, routers) if role == Component.WORKER else None,
    )


# --- problems ---


def _status_problems(cluster: raw.Raw) -> Iterator[str]:
    generation = raw.number(cluster, "metadata", "generation")
    seen = raw.at(cluster, "status", "observedGeneration")
    if type(seen) is not int:
        yield (
            "It has no status: the controller has not seen it. Does it run, and does it watch this namespace? "
            "kubectl get pods -A -l app.kubernetes.io/name=kvcluster,app.kubernetes.io/component=controller"
        )
    elif seen < generation:
        yield (
            f"The status is about generation {seen} and the spec is at {generation}: the controller is behind, "
            "or does not run."
        )


def _condition_problems(conditions: Iterable[ConditionRow]) -> list[str]:
    """Conditions that are not as they should be. Degraded comes first: it names the cause, from which others follow."""
    bad = sorted((row for row in conditions if row.good is False), key=lambda row: row.type != "Degraded")
    return [f"{row.message} ({row.type} is {row.status}: {row.reason})" for row in bad]


def _pod_problems(gathered: Gathered, now: datetime) -> list[str]:
    found = (
        find_pod_problem(pod, gathered.namespace, now)
        for component in Component
        for pod in active(gathered.pods, component)
    )
    return [problem.message for problem in found if problem is not None]


def _worker_problems(pods: Iterable[PodRow], foreign: Iterable[ForeignWorkerRow]) -> Iterator[str]:
    # It is expected of a pod that is not ready that it gets no requests.
    ready = [(pod.name, pod.worker) for pod in pods if pod.ready and pod.worker is not None]
    for name, worker in (*ready, *((row.name, row.figures) for row in foreign)):
        if not worker.routable:
            is_ready = "is ready, and " if (name, worker) in ready else ""
            yield f"Worker {name} {is_ready}gets no requests: {worker.why_not}"
        elif not worker.matched and not worker.history:
            yield f"Worker {name} gets requests by load alone: {worker.why_not}"


def _router_problems(routers: Iterable[RouterAnswer]) -> Iterator[str]:
    for router in routers:
        discovery = router.report.discovery if router.report is not None else None
        if discovery is not None and not discovery.healthy:
            yield (
                f"Router {router.pod} no longer learns which workers exist "
                f"({discovery.error or 'no reason is given'}), and serves with its last list."
            )


def _distinct(problems: Iterable[str]) -> tuple[str, ...]:
    """The problems without those whose text another one contains."""
    found: list[str] = []
    for problem in problems:
        text = _without_condition(problem)
        if not any(_without_condition(other) in text or text in _without_condition(other) for other in found):
            found.append(problem)
    return tuple(found)


def _without_condition(problem: str) -> str:
    """A problem without the condition that reports it."""
    return re.sub(r" \(\w+ is (True|False): \w+\)$", "", problem)


# --- events and decisions ---


def _events(events: Iterable[raw.Raw], now: datetime) -> tuple[EventRow, ...]:
    latest = sorted(events, key=_last_written, reverse=True)
    # The sort is stable: of events of the same second the one that was written last comes first.
    rows = sorted((_event(event, now) for event in latest), key=_seconds)
    return tuple(rows[:EVENTS_SHOWN])


def _last_written(event: raw.Raw) -> int:
    version = raw.text(event, "metadata", "resourceVersion")
    return int(version) if version.isdecimal() else 0


def _seconds(row: EventRow) -> float:
    return float("inf") if row.seconds is None else row.seconds


def _event(event: raw.Raw, now: datetime) -> EventRow:
    seen = (
        raw.at(event, "series", "lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or raw.at(event, "metadata", "creationTimestamp")
    )
    kind, name = (raw.text(event, "involvedObject", field) for field in ("kind", "name"))
    return EventRow(
        type=raw.text(event, "type"),
        reason=raw.text(event, "reason"),
        object=f"{kind}/{name}",
        message=raw.text(event, "message"),
        count=raw.number(event, "series", "count") or raw.number(event, "count") or 1,
        seconds=_since(seen, now),
    )


def decision_reasons(page: Page) -> dict[str, int]:
    """Decisions by reason over all routers, the most frequent first."""
    total: dict[str, int] = {}
    for router in page.routers:
        for reason, count in (router.report.decisions if router.report is not None else {}).items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def last_decisions(page: Page, count: int) -> list[tuple[str, RecentDecision]]:
    """The latest decisions of each router, by router, the newest first."""
    return [
        (router.pod, decision)
        for router in page.routers
        if router.report is not None
        for decision in router.report.recent[:count]
    ]
