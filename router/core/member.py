"""One worker as the fleet knows it: its view, its work and whether it lives."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.feed import Load
from router.core.heat import Heat
from router.core.index import PrefixIndex
from router.core.view import View
from router.core.work import Work


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker for metrics, the explain endpoint and the list of workers. Seconds and blocks."""

    worker_id: str
    """What the worker calls itself; its URL until it has said so."""
    url: str
    model: str
    epoch: int | None
    seq: int | None
    view_age: float | None
    """Since the copy of its cache was last known to be right; None without a copy."""
    blocks: int
    """Physical blocks in the copy."""
    capacity: int
    load: Load | None
    in_flight: int
    """Requests of this router."""
    queue_seconds: float
    latency_factor: float
    """Observed against predicted prefill; 1.0: as the profile says."""
    ready: bool
    why_not_ready: str
    matching: bool
    """Whether prompts are matched against its cache."""
    why_not_matching: str
    discovered: bool
    """Named by discovery; otherwise known by its heartbeats."""
    unknown_removals: int
    """Removals of blocks that the copy did not hold; 0 with a feed in order."""
    heat: float
    """Blocks that requests reused there in this life of the worker, those of 10 minutes ago counted half."""


class Member:
    """State of one worker. The registry decides what happens to it; `why` says why it is no candidate."""

    __slots__ = (
        "bit",
        "discovered",
        "doubted",
        "feed_vouches",
        "heard_at",
        "heat",
        "reachable",
        "serving",
        "turn",
        "url",
        "view",
        "why",
        "work",
    )

    def __init__(self, url: str, view: View, work: Work, heat: Heat) -> None:
        self.url = url
        self.view = view
        self.work = work
        self.heat = heat
        self.feed_vouches = True
        """Its feed comes from the process that serves its requests, so it is a sign of life."""
        self.bit = 1 << view.slot
        self.discovered = False
        self.serving = True
        self.reachable = False
        self.why = "it has not been heard from yet"
        self.heard_at = 0.0
        self.doubted = False
        """Whether its silence was excused once since it was last heard."""
        self.turn = 0

    @property
    def worker_id(self) -> str:
        return self.view.info.worker_id if self.view.info is not None else self.url

    @property
    def model(self) -> str:
        """Empty until the worker has said so."""
        return self.view.info.model if self.view.info is not None else ""

    @property
    def ready(self) -> bool:
        return self.reachable and self.serving

    def heard(self, now: float) -> None:
        """A sign of life."""
        self.heard_at = now
        self.reachable = True
        self.doubted = False

    def fed(self, now: float) -> None:
        """Its feed spoke."""
        if self.feed_vouches:
            self.heard(now)

    def silence(self, why: str) -> None:
        """No candidate until it is heard from again. Its view stays: if it is the same process, it is still right."""
        self.reachable = False
        self.why = why or "it cannot be reached"

    def status(self, index: PrefixIndex, now: float) -> WorkerStatus:
        view, work = self.view, self.work
        unmatched = view.why_unusable(now)
        why = "" if self.ready else "it is terminating or not ready" if not self.serving else self.why
        return WorkerStatus(
            worker_id=self.worker_id,
            url=self.url,
            model=self.model,
            epoch=view.epoch,
            seq=view.seq if view.synced else None,
            view_age=now - view.confirmed_at if view.confirmed_at is not None else None,
            blocks=index.blocks(view.slot),
            capacity=work.capacity,
            load=work.load,
            in_flight=work.ledger.in_flight,
            queue_seconds=work.queue(now),
            latency_factor=work.pace.factor(now),
            ready=self.ready,
            why_not_ready=why,
            matching=not unmatched,
            why_not_matching=unmatched,
            discovered=self.discovered,
            unknown_removals=view.unknown,
            heat=self.heat.value(now),
        )
