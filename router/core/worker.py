"""One worker as the fleet knows it: its view, its work and whether it lives."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.feed import Load, WorkerInfo
from router.core.decision import CandidateView
from router.core.errors import AgentListed
from router.core.index import PrefixIndex
from router.core.outliers import Record
from router.core.reuse import ReuseScore
from router.core.view import View
from router.core.work import Shape, Work
from router.core.worker_state import Contact, Event, Life, State, transition


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
    decode_factor: float
    """The same of decoding."""
    state: State
    ready: bool
    """A request that comes now may be sent there."""
    why_not_ready: str
    state_until: float | None
    """Seconds until its pause or ejection is over; None: there is no such time."""
    matching: bool
    """Whether prompts are matched against its cache."""
    why_not_matching: str
    discovered: bool
    """Named by discovery; otherwise known by its heartbeats."""
    unknown_removals: int
    """Removals of blocks that the copy did not hold; 0 with a feed in order."""
    reuse_score: float
    """Blocks that requests reused there in this life of the worker, those of 10 minutes ago counted half."""


class Worker:
    """State of one worker. The fleet decides what happens to it; `why` says why it is no candidate."""

    __slots__ = (
        "bit",
        "discovered",
        "doubted",
        "explicit_pause",
        "feed_vouches",
        "heard_at",
        "life",
        "paused_until",
        "pauses",
        "record",
        "reuse_score",
        "state",
        "turn",
        "url",
        "view",
        "why",
        "work",
    )

    def __init__(self, url: str, view: View, work: Work, reuse_score: ReuseScore) -> None:
        self.url = url
        self.view = view
        self.work = work
        self.reuse_score = reuse_score
        self.feed_vouches = True
        """Its feed comes from the process that serves its requests, so it is a sign of life."""
        self.bit = 1 << view.slot
        self.discovered = False
        self.life = Life()
        self.state = self.life.state
        """Derived from `life`; each decision looks at it."""
        self.record = Record()
        self.paused_until = 0.0
        self.pauses = 0
        """Times it turned a request away since it last answered one."""
        self.explicit_pause = False
        """It said itself how long (Retry-After)."""
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
    def reachable(self) -> bool:
        return self.life.contact is Contact.ALIVE

    def moves(self, event: Event) -> None:
        """What happened to it."""
        self.life = transition(self.life, event)
        self.state = self.life.state

    def heard(self, now: float) -> None:
        """A sign of life. One that was lost may be another process now."""
        self.heard_at = now
        self.doubted = False
        if self.life.contact in (Contact.NONE, Contact.LOST):
            self.moves(Event.HEARD)
            self.renewed()

    def renewed(self) -> None:
        """It may be another process: what the earlier one was paused for is over, what it was ejected for is probed."""
        self.pauses = 0
        self.moves(Event.RESUMED)
        self.moves(Event.PROBED)

    def unmask(self, info: WorkerInfo) -> AgentListed | None:
        """Its own feed speaks. Why no request may go here all the same: it is a cache agent's."""
        if not self.feed_vouches or not info.engine:
            return None
        self.moves(Event.UNMASKED)
        self.why = str(listed := AgentListed(self.url, info.engine))
        return listed

    def fed(self, now: float) -> None:
        """Its feed spoke."""
        if self.feed_vouches:
            self.heard(now)

    def silence(self, why: str) -> None:
        """No candidate until it is heard from again. Its view stays: if it is the same process, it is still right."""
        self.moves(Event.LOST)
        self.why = why or "it cannot be reached"

    def update(self, info: WorkerInfo, load: Load, now: float) -> None:
        """What the worker says of itself in a snapshot or a heartbeat."""
        if self.view.epoch != info.epoch:
            self.work.forget_report()
            self.reuse_score.clear()
            self.renewed()
        self.view.meet(info)
        self.work.report(load, now)

    def why_left_out(self) -> str:
        """Why requests go elsewhere; empty: they do not."""
        ejection = self.record.ejection
        match self.state:
            case State.STARTING | State.UNREACHABLE | State.AGENT:
                return self.why
            case State.CLOSED:
                return "it is terminating or not ready"
            case State.DRAINING:
                return "it is terminating: chosen only when there is no other"
            case State.PAUSED:
                return "it turned a request away"
            case State.EJECTED | State.HALF_OPEN if ejection is not None:
                return ejection.why
        return ""

    def until(self) -> float | None:
        """When its pause or ejection is over."""
        if self.state is State.PAUSED:
            return self.paused_until
        return self.record.ejection.until if self.state is State.EJECTED and self.record.ejection else None

    def figures(
        self, shape: Shape, matched: int, best: int, charge: float, streaming: bool, now: float
    ) -> CandidateView:
        """`charge`: seconds for each block that this worker would compute though another one holds it (`best`)."""
        expected, in_flight = self.work.expect(shape, matched, now), self.work.in_flight()
        cost = expected.queue + expected.prefill + charge * (best - matched)
        if not streaming:
            # Its client waits for the last token, and whoever is being answered there waits for its prefill.
            cost += expected.decode + expected.prefill * in_flight
        return CandidateView(
            worker_id=self.worker_id,
            url=self.url,
            matched_blocks=matched,
            queue_seconds=expected.queue,
            memory_seconds=expected.memory,
            prefill_seconds=expected.prefill,
            decode_seconds=expected.decode,
            cost=cost,
            in_flight=in_flight,
            assigned_seconds=self.work.assigned(now),
            turn=self.turn,
        )

    def status(self, index: PrefixIndex, now: float, *, ready: bool) -> WorkerStatus:
        """As of `now`; `ready`: it is a candidate."""
        view, work = self.view, self.work
        unmatched = view.why_unusable(now)
        until = self.until()
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
            latency_factor=work.correction.prefill.factor(now),
            decode_factor=work.correction.decode.factor(now),
            state=self.state,
            ready=ready,
            why_not_ready="" if ready else self.why_left_out(),
            state_until=max(until - now, 0.0) if until is not None else None,
            matching=not unmatched,
            why_not_matching=unmatched,
            discovered=self.discovered,
            unknown_removals=view.unknown,
            reuse_score=self.reuse_score.value(now),
        )
