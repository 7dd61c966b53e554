"""What one router knows, in a form that can be added up: routers exchange reports, and the live document is made of
their sum.

`merged` is associative, and its result is exact: hit rates and quantiles are computed from sums of counts and of
histograms, never from other hit rates or quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import orjson
from pydantic import TypeAdapter, ValidationError

from router.core.view import Trust
from router.core.worker_state import WorkerPhase
from router.live.document import (
    Count,
    DecisionLive,
    DocumentError,
    Live,
    Number,
    QueueLive,
    RouterLive,
    Totals,
    WorkerLive,
    reported_error,
)
from router.live.history import STEP_SECONDS, Step, series
from router.live.updates import DECISIONS


@dataclass(frozen=True, slots=True, order=True)
class LoadReported:
    """A worker's last report of its load, as one router has it. The youngest one counts."""

    age: Number
    """Seconds."""
    running: Count
    waiting: Count
    capacity: Count
    """Usable blocks."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What routers know of one worker. Fields that `WorkerLive` has too mean the same here."""

    url: str
    worker_id: str
    pod: str
    state: WorkerPhase
    ready: bool
    problems: tuple[tuple[str, str], ...]
    """(router's name, what is wrong in words), for each router that sees a problem."""
    routers: Count
    """Routers that know the worker."""
    load: LoadReported | None
    held: tuple[Number, Count] | None
    """Age of the youngest exact view, in seconds, and the blocks in it."""
    view_age: Number | None
    """Of the oldest view."""
    trust: Trust
    prompt_tokens: Count
    """Of the answers that report cached tokens."""
    cached_tokens: Count
    reuse_score: Number
    in_flight: Count
    requests: Count


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums since the routers started."""

    requests: Count = 0
    errors: Count = 0
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    prefill_seconds_saved: Number = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.errors + other.errors,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.prefill_seconds_saved + other.prefill_seconds_saved,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What one router, or several of them together, know at one moment."""

    bounds: tuple[tuple[Number, ...], tuple[Number, ...]]
    """Upper bounds of the histograms of TTFT and TPOT."""
    instance: str
    """Identifies the process of the (first) router: a report of one's own may come back through a Service."""
    routers: tuple[RouterLive, ...]
    uptime_seconds: Number
    """Of the router that has run longest."""
    workers: tuple[WorkerReport, ...]
    counts: Counts
    steps: tuple[Step, ...]
    """In the order of their numbers."""
    decisions: tuple[DecisionLive, ...]
    """Newest first."""
    queues: tuple[QueueLive, ...] = ()
    """In the order of their priorities, the highest first."""


_SEVERITY: Mapping[WorkerPhase, int] = {
    phase: rank
    for rank, phase in enumerate(
        (
            WorkerPhase.SERVING,
            WorkerPhase.HALF_OPEN,
            WorkerPhase.PAUSED,
            WorkerPhase.STARTING,
            WorkerPhase.DRAINING,
            WorkerPhase.CLOSED,
            WorkerPhase.EJECTED,
            WorkerPhase.UNREACHABLE,
            WorkerPhase.AGENT,
            WorkerPhase.GONE,
        )
    )
}
_TRUST_RANK: Mapping[Trust, int] = {trust: rank for rank, trust in enumerate((Trust.EXACT, Trust.PARTIAL, Trust.NONE))}


def merged(first: Report, *others: Report) -> Report:
    """Everything that these routers know. Associative; the order of the routers is that of the arguments.

    Raises `DocumentError` if their histograms have other bounds, as those of another version may.
    """
    workers: dict[str, WorkerReport] = {}
    steps: dict[int, Step] = {}
    counts = Counts()
    routers: list[RouterLive] = []
    queues: dict[tuple[int, str], QueueLive] = {}
    for report in (first, *others):
        if report.bounds != first.bounds:
            raise DocumentError("it measures times in other buckets than this router: is it of another version?")
        routers += report.routers
        counts += report.counts
        for worker in report.workers:
            known = workers.get(worker.url)
            workers[worker.url] = worker if known is None else _merged_workers(known, worker)
        for queue in report.queues:
            same = queues.get(key := (-queue.priority, queue.name))
            queues[key] = queue if same is None else _merged_queues(same, queue)
        for step in report.steps:
            other = steps.get(step.number)
            steps[step.number] = step if other is None else other + step
    return Report(
        first.bounds,
        first.instance,
        tuple(routers),
        max(report.uptime_seconds for report in (first, *others)),
        tuple(workers[url] for url in sorted(workers)),
        counts,
        tuple(steps[number] for number in sorted(steps)),
        latest(decision for report in (first, *others) for decision in report.decisions),
        tuple(queues[key] for key in sorted(queues)),
    )


def by(at: float, report: Report) -> Report:
    """The report of a router whose clock may be ahead, without what it says of the time after `at` (Unix seconds):
    steps that have not begun are left out, and its decisions were made by `at`. Otherwise they would hide what the
    others say of the present."""
    begun = int(at // STEP_SECONDS) + 1
    return replace(
        report,
        steps=tuple(step for step in report.steps if step.number <= begun),
        decisions=tuple(each if each.at <= at else replace(each, at=round(at, 3)) for each in report.decisions),
    )


def latest(decisions: Iterable[DecisionLive]) -> tuple[DecisionLive, ...]:
    """The latest of them, each once, newest first, as many as a document holds."""
    by_id = {decision.id: decision for decision in decisions}
    return tuple(sorted(by_id.values(), key=lambda each: (-each.at, each.id))[:DECISIONS])


def _merged_queues(one: QueueLive, two: QueueLive) -> QueueLive:
    return QueueLive(
        name=one.name,
        priority=one.priority,
        waiting=one.waiting + two.waiting,
        held=one.held + two.held,
        oldest_seconds=max((age for age in (one.oldest_seconds, two.oldest_seconds) if age is not None), default=None),
        shed=one.shed + two.shed,
    )


def _merged_workers(one: WorkerReport, two: WorkerReport) -> WorkerReport:
    return WorkerReport(
        url=one.url,
        worker_id=max(one.worker_id, two.worker_id, key=lambda name: (name != one.url, name)),
        pod=max(one.pod, two.pod),
        state=max(one.state, two.state, key=_SEVERITY.__getitem__),
        ready=one.ready and two.ready,
        problems=tuple(sorted({*one.problems, *two.problems})),
        routers=one.routers + two.routers,
        load=min((load for load in (one.load, two.load) if load is not None), default=None),
        held=min((held for held in (one.held, two.held) if held is not None), default=None),
        view_age=max((age for age in (one.view_age, two.view_age) if age is not None), default=None),
        trust=max(one.trust, two.trust, key=_TRUST_RANK.__getitem__),
        prompt_tokens=one.prompt_tokens + two.prompt_tokens,
        cached_tokens=one.cached_tokens + two.cached_tokens,
        reuse_score=one.reuse_score + two.reuse_score,
        in_flight=one.in_flight + two.in_flight,
        requests=one.requests + two.requests,
    )


_REPORT = TypeAdapter(Report)


def encode_report(report: Report) -> bytes:
    """JSON."""
    return orjson.dumps(report)


def decode_report(body: bytes) -> Report:
    """Inverse of `encode_report`. Raises `DocumentError`: it may come from a router of another version."""
    try:
        return _REPORT.validate_json(body)
    except ValidationError as error:
        raise reported_error(error, "report of a router") from None


def live(report: Report, at: float) -> Live:
    """The document that shows this at Unix time `at`."""
    history = series(report.steps, *report.bounds)
    shown = [step for step in report.steps if step.number * history.step_seconds >= history.at[0]] if history.at else []
    seconds = (shown[-1].number - shown[0].number) * history.step_seconds + shown[0].seconds if shown else 0.0
    counts = report.counts
    return Live(
        at=round(at, 3),
        routers=report.routers,
        workers=tuple(map(_worker, report.workers)),
        totals=Totals(
            counts.requests,
            counts.errors,
            counts.prompt_tokens,
            counts.cached_tokens,
            ratio(counts.cached_tokens, counts.prompt_tokens),
            round(counts.prefill_seconds_saved, 3),
            round(sum(step.prefill_seconds_saved for step in shown) / seconds, 4) if seconds else None,
            float(int(report.uptime_seconds)),
        ),
        history=history,
        decisions=report.decisions,
        queues=report.queues,
    )


def _worker(report: WorkerReport) -> WorkerLive:
    """Figures that change all the time, and by little, are rounded: what did not change need not be sent."""
    load, held, age = report.load, report.held, report.view_age
    blocks, capacity = held[1] if held is not None else 0, load.capacity if load is not None else 0
    return WorkerLive(
        url=report.url,
        worker_id=report.worker_id,
        pod=report.pod,
        state=report.state,
        ready=report.ready,
        problem=_in_words(report),
        running=load.running if load is not None else None,
        waiting=load.waiting if load is not None else None,
        cache_fill=min(round(blocks / capacity, 3), 1.0) if capacity and held is not None else None,
        blocks=blocks,
        capacity=capacity,
        view_age_seconds=float(int(age)) if age is not None else None,
        trust=report.trust,
        hit_rate=ratio(report.cached_tokens, report.prompt_tokens),
        reuse_score=float(f"{report.reuse_score:.2g}"),
        in_flight=report.in_flight,
        requests=report.requests,
    )


def _in_words(report: WorkerReport) -> str | None:
    """Everyone's problem is told once; where routers differ, each one's with its name."""
    words = {problem for _, problem in report.problems}
    if len(words) == 1 and len(report.problems) == report.routers:
        return words.pop()
    return "; ".join(f"{router}: {problem}" for router, problem in report.problems) or None


def ratio(part: float, whole: float) -> float | None:
    """A share of 0..1, in ten-thousandths."""
    return round(part / whole, 4) if whole else None
