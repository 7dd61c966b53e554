"""Makes a router's own report from what it counts and knows anyway. Nothing here runs for a request."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

from router.core.decision import Decision, RecentDecisions
from router.core.fleet import Fleet, WorkerStatus
from router.core.flow import FlowControl, WaitState
from router.core.view import Trust
from router.live.document import DecisionLive, QueueLive, RouterLive
from router.live.history import STEP_SECONDS, Reading, Recorder
from router.live.report import Counts, LoadReported, Report, WorkerReport
from router.metrics import TPOT_BUCKETS, TTFT_BUCKETS, Metrics, total

BOUNDS = (TTFT_BUCKETS, TPOT_BUCKETS)
"""Upper bounds of the histograms in a report."""
LATE = 0.02
"""Seconds after the end of a step at which its reading is taken: a timer may run a little early."""


Describe: TypeAlias = Callable[[Sequence[WorkerStatus]], RouterLive]
"""Describes a router, given its workers."""


@dataclass(slots=True)
class Gatherer:
    """`clock` is the router's own, `wall` gives Unix seconds, `pod(url)` the pod of the worker at a URL ("": unknown),
    `instance` identifies the process."""

    fleet: Fleet
    metrics: Metrics
    recent: RecentDecisions
    _: KW_ONLY
    clock: Callable[[], float]
    wall: Callable[[], float]
    pod: Callable[[str], str]
    instance: str
    flow: FlowControl | None = None
    """What holds requests back; None: nothing does."""
    started: float = field(init=False)
    _recorder: Recorder = field(default_factory=Recorder, init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    async def record(self) -> None:
        """Record a step of the history at the end of each. This is all that is done while nobody looks. Ends only with
        its task."""
        while True:
            self.take_reading()
            await asyncio.sleep(STEP_SECONDS - self.wall() % STEP_SECONDS + LATE)

    def take_reading(self) -> None:
        """Record what has happened since the last call as one step, if a step has ended."""
        metrics, counts = self.metrics, self._counts()
        most, mean = self.fleet.directory.load_spread()
        reading = Reading(
            counts.requests,
            counts.prompt_tokens,
            counts.cached_tokens,
            counts.prefill_seconds_saved,
            tuple(map(sum, zip(*(buckets.counts for buckets in metrics.ttft.by_value.values()), strict=True))),
            tuple(metrics.tpot.counts),
            most,
            mean,
        )
        self._recorder.take(reading, self.wall())

    def report(self, describe: Describe, after: int = 0) -> Report:
        """What this router knows now. Of its history, the steps with numbers above `after`. O(workers)."""
        now = self.clock()
        workers = self.fleet.workers(now)
        router = describe(workers)
        name = router.name
        return Report(
            bounds=BOUNDS,
            instance=self.instance,
            routers=(router,),
            uptime_seconds=now - self.started,
            workers=tuple(
                sorted(
                    (_worker(each, self.pod(each.url), name) for each in workers),
                    key=lambda worker: worker.url,
                )
            ),
            counts=self._counts(),
            steps=self._recorder.steps(after),
            decisions=tuple(self._decisions(name, now)),
            queues=tuple(self._queues(self.flow, now)) if self.flow is not None else (),
        )

    def _queues(self, flow: FlowControl, now: float) -> Iterator[QueueLive]:
        shed: Counter[str] = Counter()
        for sample in (sample for family in self.metrics.flow_shed.collect() for sample in family.samples):
            if sample.name.endswith("_total"):
                shed[sample.labels["class"]] += int(sample.value)
        for queue in flow.classes:
            oldest = queue.oldest
            yield QueueLive(
                name=queue.policy.name,
                priority=queue.policy.priority,
                waiting=queue.waiting,
                held=len(queue.waits[WaitState.HELD]),
                oldest_seconds=round(now - oldest.arrived, 1) if oldest is not None else None,
                shed=shed[queue.policy.name],
            )

    def _counts(self) -> Counts:
        metrics, requests, errors = self.metrics, 0, 0
        for (code, _), count in metrics.requests.counts.items():
            requests += count
            if code >= "500":
                errors += count
        return Counts(
            requests,
            errors + int(total(metrics.broken_streams)),
            int(metrics.reported_prompt.value),
            int(metrics.actual_cached.value),
            metrics.prefill_saved.value,
        )

    def _decisions(self, router: str, now: float) -> Iterator[DecisionLive]:
        wall = self.wall()
        for behind, (age, decision) in enumerate(self.recent.newest_first(now)):
            yield _decision(decision, f"{self.instance}:{self.recent.noted - behind}", wall - age, router)


def _decision(decision: Decision, name: str, at: float, router: str) -> DecisionLive:
    chosen = next(candidate for candidate in decision.candidates if candidate.url == decision.url)
    return DecisionLive(
        id=name,
        at=round(at, 3),
        router=router,
        worker_id=decision.worker_id,
        reason=decision.reason.value,
        matched_blocks=decision.matched_blocks,
        prompt_blocks=decision.prompt_blocks,
        predicted_ttft_seconds=decision.predicted_ttft,
        queue_seconds=decision.queue_seconds,
        load_seconds=chosen.load_seconds,
        prefill_seconds=decision.prefill_seconds,
        decode_seconds=chosen.decode_cost,
        charge_seconds=chosen.charge_seconds,
    )


def _worker(status: WorkerStatus, pod: str, router: str) -> WorkerReport:
    load, problem = status.load, _problem(status)
    exact = status.seq is not None and status.trust is not Trust.NONE
    return WorkerReport(
        url=status.url,
        worker_id=status.worker_id,
        pod=pod,
        state=status.state,
        ready=status.ready,
        problems=((router, problem),) if problem else (),
        routers=1,
        load=(
            LoadReported(status.load_age, load.running, load.waiting, load.total_blocks)
            if load is not None and status.load_age is not None
            else None
        ),
        held=(status.view_age, status.blocks) if exact and status.view_age is not None else None,
        view_age=status.view_age,
        trust=status.trust,
        prompt_tokens=status.prompt_tokens,
        cached_tokens=status.cached_tokens,
        reuse_score=status.reuse_score,
        in_flight=status.in_flight,
        requests=status.requests,
    )


def _problem(status: WorkerStatus) -> str:
    """What is wrong with the worker, in words; empty: nothing."""
    if not status.ready:
        left = status.state_until
        return status.why_not_ready + (f" ({math.ceil(left)} s left)" if left else "")
    if status.trust is Trust.NONE:
        return f"its cache is not used: {status.why_not_matching}"
    if not status.matching:
        return status.why_not_matching
    if status.unknown_removals:
        return f"its feed removed {status.unknown_removals} blocks that the view did not hold"
    return "; ".join(f"adapter {name!r} is not loaded: {why}" for name, why in status.missing_adapters.items())
