"""One worker as the fleet knows it: its state, its view, its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcache.feed import Load, Tier, WorkerInfo
from kvcache.ranks import split_rank
from router.core.decision import Candidate
from router.core.errors import AgentListed
from router.core.history import History
from router.core.index import PrefixIndex
from router.core.matches import NO_LOAD, Matches
from router.core.outliers import Record
from router.core.reuse import ReuseScore
from router.core.shape import Shape
from router.core.standing import Changes
from router.core.view import Trust, View
from router.core.work import Work
from router.core.worker_state import Circuit, Intake, Liveness, WorkerEvent, WorkerPhase, WorkerState, transition


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as metrics, `GET /workers` and `POST /explain` show it. Seconds and blocks."""

    worker_id: str
    """The id that the worker states; its URL until then."""
    url: str
    model: str
    names: tuple[str, ...]
    """Further names of the model."""
    adapters: tuple[str, ...]
    """LoRA adapters that it has loaded."""
    missing_adapters: Mapping[str, str]
    """Adapters that it should have loaded, each with the reason why it is not."""
    epoch: int | None
    seq: int | None
    view_age: float | None
    """Since the copy of its cache was last confirmed; None without a copy."""
    blocks: int
    """Physical blocks in the copy, on the GPU."""
    slower_blocks: Mapping[Tier, int]
    """Those in each slower tier that the worker loads blocks from."""
    capacity: int
    """Usable blocks."""
    block_size: int
    """Tokens of one of its blocks; 0 until it says."""
    load: Load | None
    load_age: float | None
    """Since the worker reported its load; None without a report."""
    in_flight: int
    """Requests of this router."""
    queue_seconds: float
    latency_factor: float
    """Observed / predicted prefill time; 1.0: as the profile says."""
    decode_factor: float
    """Observed / predicted decode time."""
    state: WorkerPhase
    ready: bool
    """It is a candidate for a request that comes now."""
    why_not_ready: str
    state_until: float | None
    """Seconds until its pause or ejection is over; None: there is no such time."""
    matching: bool
    """Whether prompts are matched against its cache."""
    why_not_matching: str
    history: bool
    """It serves no cache feed: prompts are matched against what this router has sent there."""
    discovered: bool
    """Named by discovery; otherwise known by its heartbeats."""
    trust: Trust
    """How far the copy of its cache can be relied on."""
    unknown_removals: int
    """Removals of blocks that the copy did not hold; 0 while the feed is in order."""
    reuse_score: float
    """Blocks that requests reused on this incarnation of the worker, those of 10 minutes ago counted half."""
    requests: int
    """Requests that this router has sent to it since it joined, further attempts included."""
    prompt_tokens: int
    """Tokens of their prompts, as the answers that report cached tokens state them."""
    cached_tokens: int
    """Cached tokens as those answers report them: divided by `prompt_tokens`, the hit rate."""


NO_FEED = "it serves no cache feed: prompts are matched against what this router has sent there"
"""`WorkerStatus.why_not_matching` of a worker with a history."""

_BY_INTAKE = {
    Intake.OPEN: WorkerEvent.OPENED,
    Intake.DRAINING: WorkerEvent.DRAINING,
    Intake.CLOSED: WorkerEvent.CLOSED,
}


@dataclass(slots=True, eq=False)
class Worker:
    """One worker of a fleet. The fleet decides what happens to it; `why` says why it is unreachable or an agent."""

    url: str
    view: View
    work: Work
    reuse_score: ReuseScore
    changes: Changes
    address: str = field(init=False)
    """Its process's URL: that of every rank of the process."""
    rank: int = field(init=False)
    """Its data-parallel rank."""
    bit: int = field(init=False)
    discovered: bool = field(default=False, init=False)
    """Discovery names it; otherwise it is known by its heartbeats."""
    feed_proves_liveness: bool = field(default=True, init=False)
    """Its feed comes from the process that serves its requests."""
    state: WorkerState = field(default_factory=WorkerState, init=False)
    phase: WorkerPhase = field(init=False)
    """That of `state`, kept because each decision looks at it."""
    why: str = field(default="it has not been heard from yet", init=False)
    heard_at: float = field(default=0.0, init=False)
    record: Record = field(default_factory=Record, init=False)
    pauses: int = field(default=0, init=False)
    """Times it turned a request away since it last answered one."""
    paused_until: float = field(default=0.0, init=False)
    history: History | None = field(default=None, init=False)
    """What it should hold; None while it serves a cache feed, or is not known to serve none."""
    turn: int = field(default=0, init=False)
    """Number of the last dispatch to it."""

    def __post_init__(self) -> None:
        self.address, self.rank = split_rank(self.url)
        self.bit = 1 << self.view.slot
        self.phase = self.state.phase

    @property
    def worker_id(self) -> str:
        return self.view.info.worker_id if self.view.info is not None else self.url

    @property
    def model(self) -> str:
        """Empty until the worker has said so."""
        return self.view.info.model if self.view.info is not None else ""

    @property
    def named_rank(self) -> int | None:
        """The rank that requests have to name; None: the process has one only, as far as it has said."""
        info = self.view.info
        return self.rank if self.rank or (info is not None and info.ranks > 1) else None

    @property
    def reachable(self) -> bool:
        return self.state.reachable

    @property
    def paused(self) -> bool:
        return self.state.circuit in (Circuit.BACKING_OFF, Circuit.RETRY_AFTER)

    def advance(self, event: WorkerEvent) -> None:
        """Move to the state that follows."""
        before = self.phase
        self.state = transition(self.state, event)
        self.phase = self.state.phase
        if self.phase is not before:
            self.changes.phases += 1
            self.changes.on_room()

    def mark_alive(self, now: float) -> None:
        """The worker gave a sign of life. If it was unreachable before, it may be another process now."""
        self.heard_at = now
        before = self.state.liveness
        if before is not Liveness.ALIVE:
            self.advance(WorkerEvent.HEARD)
            if before in (Liveness.KNOWN, Liveness.UNREACHABLE):
                self._restarted()

    def mark_unreachable(self, why: str) -> None:
        """No candidate until it is heard from again. Its view stays: if the process is the same, it is still right."""
        self.advance(WorkerEvent.LOST)
        self.why = why or "it cannot be reached"

    def excuse(self, now: float) -> None:
        """The worker gets one more period before it counts as unreachable."""
        self.advance(WorkerEvent.EXCUSED)
        self.heard_at = now

    def set_intake(self, intake: Intake) -> None:
        """What the worker does with new requests."""
        self.advance(_BY_INTAKE[intake])

    def feed_received(self, now: float) -> None:
        """A message of its feed came."""
        if self.feed_proves_liveness:
            self.mark_alive(now)

    def detect_agent(self, info: WorkerInfo) -> AgentListed | None:
        """Why no request may go to this URL although its feed answers: it is that of a cache agent."""
        if not self.feed_proves_liveness or not info.engine:
            return None
        self.advance(WorkerEvent.FOUND_TO_BE_AGENT)
        self.why = str(listed := AgentListed(self.url, info.engine))
        return listed

    def update(self, info: WorkerInfo, load: Load, now: float) -> bool:
        """The worker states what it is and what load it has, in a snapshot or a heartbeat. Returns whether it is
        something else than before."""
        before = self.view.info
        if self.view.epoch != info.epoch:
            self.work.forget_report()
            self.reuse_score.clear()
            self._restarted()
        self.view.update(info)
        self.work.set_shape(info)
        self.work.report(load, now)
        return info != before

    def close(self) -> None:
        """The worker left the fleet. Its open tickets stay releasable."""
        self.advance(WorkerEvent.REMOVED)
        self.view.close()
        self.work.leave()

    def _restarted(self) -> None:
        """It may be a new process, to which pauses and failures of the earlier incarnation do not apply."""
        self.pauses = 0
        self.advance(WorkerEvent.RESTARTED)

    def why_not_ready(self) -> str:
        """Why requests go elsewhere; empty: they do not."""
        ejection = self.record.ejection
        match self.phase:
            case WorkerPhase.STARTING | WorkerPhase.UNREACHABLE | WorkerPhase.AGENT:
                return self.why
            case WorkerPhase.CLOSED:
                return "it is terminating or not ready"
            case WorkerPhase.DRAINING:
                return "it is terminating: chosen only when there is no other"
            case WorkerPhase.PAUSED:
                return "it turned a request away"
            case WorkerPhase.EJECTED | WorkerPhase.HALF_OPEN if ejection is not None:
                return ejection.why
        return ""

    def state_ends_at(self) -> float | None:
        """When its pause or ejection is over; None: there is no such time."""
        if self.phase is WorkerPhase.PAUSED:
            return self.paused_until
        return self.record.ejection.until if self.phase is WorkerPhase.EJECTED and self.record.ejection else None

    def candidate(
        self, shape: Shape, matches: Matches, best: int, charge: float, streaming: bool, now: float
    ) -> Candidate:
        """What the request would cost here.

        `charge`: seconds that cost adds for each second of computing blocks that the best match among the candidates
        (`best` blocks) includes.
        """
        slot, loaded, seconds = self.view.slot, 0, 0.0
        matched, loads = matches.held_by(slot), NO_LOAD
        if matches.loads and slot in matches.loads:
            loads = matches.loads[slot]
            loaded, seconds = sum(loads.values()), self.view.load_seconds(loads)
            matched += loaded
        expected, in_flight = self.work.expect(shape, matched, now, loaded, seconds, best), self.work.in_flight()
        charged = charge * expected.repeated
        cost = expected.queue + expected.load + expected.prefill + expected.slowdown + charged
        if not streaming:
            # The client waits for the last token, and all requests that are being answered wait for the prefill.
            cost += expected.alone + expected.prefill * in_flight
        return Candidate(  # by position: with keywords it takes twice as long
            self.worker_id,
            self.url,
            matched,
            loads,
            expected.queue,
            expected.load,
            expected.memory,
            expected.prefill,
            expected.decode,
            expected.slowdown,
            cost,
            charged,
            expected.active,
            in_flight,
            self.work.assigned(now),
            self.turn,
        )

    def status(self, index: PrefixIndex, now: float, *, ready: bool) -> WorkerStatus:
        """As of `now`; `ready`: it is a candidate."""
        view, work, info = self.view, self.work, self.view.info
        unmatched = view.why_unusable(now)
        until = self.state_ends_at()
        return WorkerStatus(
            worker_id=self.worker_id,
            url=self.url,
            model=self.model,
            names=info.names if info is not None else (),
            adapters=info.adapters if info is not None else (),
            missing_adapters=info.missing_adapters if info is not None else {},
            epoch=view.epoch,
            seq=view.seq if view.exact else None,
            view_age=now - view.confirmed_at if view.confirmed_at is not None else None,
            blocks=index.blocks(view.slot),
            slower_blocks={tier: index.blocks(view.slot, tier) for tier in view.info.tier_seconds} if view.info else {},
            capacity=work.capacity,
            block_size=view.info.block_size if view.info is not None else 0,
            load=work.load,
            load_age=work.report_age(now),
            in_flight=work.ledger.in_flight,
            queue_seconds=work.queue(now),
            latency_factor=work.correction.prefill.factor(now),
            decode_factor=work.correction.decode.factor(now),
            state=self.phase,
            ready=ready,
            why_not_ready="" if ready else self.why_not_ready(),
            state_until=max(until - now, 0.0) if until is not None else None,
            matching=not unmatched,
            why_not_matching=unmatched if self.history is None else NO_FEED,
            history=self.history is not None,
            discovered=self.discovered,
            trust=view.trust(now),
            unknown_removals=view.unknown,
            reuse_score=self.reuse_score.value(now),
            requests=work.sent,
            prompt_tokens=work.prompt_tokens,
            cached_tokens=work.cached_tokens,
        )
