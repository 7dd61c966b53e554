"""A worker in virtual time: the product's engine, the process around it, and its end of the cache feed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from functools import partial
from typing import Protocol

from bench.simulation.clock import VirtualClock
from bench.simulation.cluster import ClusterShape, WorkerKind
from kvcache.feed import Batch, Event, Load, Snapshot, Tier, WorkerInfo
from kvcache.keys import KEY_SCHEME
from kvcache.ranks import rank_id, rank_url
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest, Output

LOAD_INTERVAL = 0.02
"""Least seconds between two load reports without cache events, as in a worker's feed."""
KEEPALIVE_INTERVAL = 1.0
"""Most seconds between two batches of a worker's feed."""
FINGERPRINT = "simulated"


class ProcessState(Enum):
    """What a simulated process does."""

    RUNNING = auto()
    DRAINING = auto()
    """It is leaving: the routers send it requests only if there is no other, and it ends when it has none."""
    FROZEN = auto()
    """It accepts connections (the kernel does), and does nothing."""
    STOPPED = auto()
    """No process listens at its address."""


class ProcessEvent(Enum):
    """What happens to a simulated process."""

    DRAINED = auto()
    """It is told to leave."""
    FROZEN = auto()
    THAWED = auto()
    ENDED = auto()
    """It is killed, or it has drained."""
    STARTED = auto()
    """Another process starts at its address."""


SIMULATED_TRANSITIONS: Mapping[tuple[ProcessState, ProcessEvent], ProcessState] = {
    (ProcessState.RUNNING, ProcessEvent.DRAINED): ProcessState.DRAINING,
    (ProcessState.RUNNING, ProcessEvent.FROZEN): ProcessState.FROZEN,
    (ProcessState.FROZEN, ProcessEvent.THAWED): ProcessState.RUNNING,
    (ProcessState.RUNNING, ProcessEvent.ENDED): ProcessState.STOPPED,
    (ProcessState.DRAINING, ProcessEvent.ENDED): ProcessState.STOPPED,
    (ProcessState.FROZEN, ProcessEvent.ENDED): ProcessState.STOPPED,
    (ProcessState.STOPPED, ProcessEvent.STARTED): ProcessState.RUNNING,
}


def transition(state: ProcessState, event: ProcessEvent) -> ProcessState:
    """The state after `event`. An event changes nothing in a state for which no transition is listed: a worker that is
    leaving, say, is not frozen."""
    return SIMULATED_TRANSITIONS.get((state, event), state)


class Caller(Protocol):
    """A router's attempt at a request, as the worker that has it knows it."""

    request: EngineRequest

    def on_output(self, output: Output, at: float) -> None:
        """The first or the last token leaves the worker at `at`."""

    def on_broken(self, now: float) -> None:
        """The worker's process ended: the connection breaks."""


class Subscription(Protocol):
    """A router's end of the worker's feed."""

    delay: float
    """Seconds from the worker to the router."""

    def receive(self, batch: Batch, now: float) -> None: ...

    def broken(self, now: float) -> None:
        """The worker's process ended."""


class SimulatedWorker:
    """One engine (a worker, or a data-parallel rank of one) in its process.

    The engine is advanced to the end of each of its steps, so routers learn of every block exactly when a live feed
    with the same delay would have told them. It makes no progress while its process is frozen.
    """

    __slots__ = (
        "_calls", "_clock", "_due", "_frozen_at", "_inbox", "_lag", "_latency", "_leaps", "_loaded", "_loaded_at",
        "_looked_at", "_reporting", "_seq", "_shape", "_skipped", "_wakes", "engine", "info", "kind", "number", "rank",
        "state", "subscriptions", "url",
    )  # fmt: skip

    def __init__(
        self, clock: VirtualClock, number: int, rank: int, shape: ClusterShape, kind: WorkerKind, *, leaps: bool
    ) -> None:
        """`leaps`: nothing happens to the process, so that its engine may take many steps at a time."""
        self._clock = clock
        self._leaps = leaps
        self._shape = shape
        self.number = number
        """Of the worker; its ranks share it."""
        self.rank = rank
        self.kind = kind
        self.url = rank_url(f"http://worker-{number}", rank)
        self.state = ProcessState.RUNNING
        self.subscriptions: list[Subscription] = []
        self._boot(1)

    def _boot(self, epoch: int) -> None:
        """A new process with an empty cache."""
        shape, config = self._shape, self.kind.engine
        self.engine = Engine(config, self.kind.latency)
        self.info = WorkerInfo(
            worker_id=rank_id(f"worker-{self.number}", self.rank, shape.ranks),
            epoch=epoch,
            model=shape.model,
            block_size=config.block_size,
            fingerprint=FINGERPRINT,
            key_scheme=KEY_SCHEME,
            capacity=config.blocks,
            max_model_len=config.max_model_len,
            rank=self.rank,
            ranks=shape.ranks,
            tier_seconds={Tier.CPU: config.cpu_block_seconds} if config.cpu_blocks else {},
            groups=config.groups,
        )
        self._calls: dict[str, Caller] = {}
        """The unfinished requests, by id."""
        self._inbox: list[tuple[EngineRequest, Caller | None]] = []
        """What came while the process was frozen: a request, or the end of the connection of one (None)."""
        self._seq = 0
        self._loaded: Load = self.engine.load()
        """As last reported."""
        self._loaded_at = 0.0
        self._looked_at = 0.0
        """When the load was last compared with the one reported."""
        self._reporting = False
        """Whether a comparison of the load is to come."""
        self._wakes: float | None = None
        """When the engine is advanced next; None: it is idle."""
        self._skipped: list[float] = []
        """Ends of steps before then, at which nothing happens that a router could see."""
        self._due = 0.0
        """The same moment on the engine's clock."""
        self._lag = 0.0
        """By how many seconds the engine's clock is behind: those for which it was frozen."""
        self._frozen_at = 0.0

    @property
    def serving(self) -> bool:
        """Whether it answers requests and probes."""
        return self.state is ProcessState.RUNNING or self.state is ProcessState.DRAINING

    @property
    def idle(self) -> bool:
        """Whether it has no requests."""
        return not self._calls

    # --- what happens to the process ---

    def kill(self, now: float) -> None:
        """The process ends at once: its connections break and its cache is lost."""
        self.state = transition(self.state, ProcessEvent.ENDED)
        calls, self._calls = self._calls, {}
        calls |= {request.request_id: caller for request, caller in self._inbox if caller is not None}
        self._wakes = None
        for caller in calls.values():
            caller.on_broken(now)
        for subscription in self.subscriptions:
            subscription.broken(now)

    def start(self, now: float) -> None:
        """Another process starts at its address."""
        if self.state is ProcessState.STOPPED:
            self.state = transition(self.state, ProcessEvent.STARTED)
            self._boot(self.info.epoch + 1)
            self._loaded_at = self._looked_at = now

    def freeze(self, now: float) -> None:
        """The process does nothing until `thaw`. Only a running one is frozen."""
        if self.state is ProcessState.RUNNING:
            self.state = transition(self.state, ProcessEvent.FROZEN)
            self._frozen_at = now
            self._wakes = None

    def thaw(self, now: float) -> None:
        """The process goes on, with what has come meanwhile."""
        if self.state is not ProcessState.FROZEN:
            return
        self.state = transition(self.state, ProcessEvent.THAWED)
        self._lag += now - self._frozen_at
        inbox, self._inbox = self._inbox, []
        for request, caller in inbox:
            if caller is None:
                self.hang_up(now, request.request_id)
            else:
                self.submit(now, request, caller)
        self._advance(now, now - self._lag)

    def drain(self) -> None:
        """The process is told to leave."""
        self.state = transition(self.state, ProcessEvent.DRAINED)

    def change_speed(self, factor: float) -> None:
        """From its next step on the engine is `factor` times as fast as its kind."""
        self.engine.change_latency(self.kind.latency.scaled(factor))

    # --- requests ---

    def submit(self, now: float, request: EngineRequest, caller: Caller) -> None:
        """A request that the worker does not refuse (`errors.refusal`) arrives."""
        if self.state is ProcessState.FROZEN:
            self._inbox.append((request, caller))
            return
        engine_now = now - self._lag
        self._calls[request.request_id] = caller
        self.engine.submit(request, engine_now)
        self._advance(now, engine_now)

    def hang_up(self, now: float, request_id: str) -> None:
        """The router has closed the connection of a request, which ends it."""
        if self.state is ProcessState.FROZEN:
            waiting = [(request, caller) for request, caller in self._inbox if request.request_id != request_id]
            if len(waiting) == len(self._inbox) and request_id in self._calls:
                waiting.append((self._calls[request_id].request, None))
            self._inbox = waiting
        elif self.state is not ProcessState.STOPPED:
            engine_now = now - self._lag
            self._advance(now, engine_now)
            if self._calls.pop(request_id, None) is not None:
                self.engine.abort(request_id, engine_now)
                self._advance(now, engine_now)

    def _advance(self, now: float, engine_now: float) -> None:
        """Advance the engine, pass its outputs on, and see to it that it is advanced at the end of its next step."""
        engine, calls, lag = self.engine, self._calls, self._lag
        if self._wakes is not None and self._wakes <= now:
            self._wakes = None
        if self._skipped:
            self._catch_up(now)
        for output in engine.advance(engine_now):
            if output.finish_reason is not None:
                calls.pop(output.request_id).on_output(output, output.at + lag)
                engine.take_finished()
            elif output.index == 0:
                calls[output.request_id].on_output(output, output.at + lag)
        changes = engine.take_events()
        if changes:
            self._report(now, tuple(feed_events(changes)), engine.load())
        elif not self._reporting:
            self._reporting = True
            self._clock.at(max(now, self._looked_at + LOAD_INTERVAL), self._report_load)
        due: float | None
        if self._leaps:
            ends = engine.next_changes()
            due = ends.pop() if ends else None
            self._skipped = ends
        else:
            due = engine.next_event()
        if due is not None and (wakes := due + lag) != self._wakes:
            self._due, self._wakes = due, wakes
            self._clock.at(wakes, self._wake)

    def _wake(self, now: float) -> None:
        if self._wakes == now:  # otherwise a request that came at the end of the step has completed it
            self._advance(now, self._due)

    # --- the feed ---

    def _catch_up(self, now: float) -> None:
        """Account for the steps that have ended without a call. After each of them, too, the load would have been
        compared with the one reported, which finds nothing new and puts off the next comparison."""
        if not self._skipped:
            return
        look: float | None = None
        passed = 0
        for end in self._skipped:
            if end > now:
                break
            passed += 1
            if self._reporting:
                continue
            if look is not None and look <= end:
                self._looked_at, look = look, None
            if look is None:
                look = max(end, self._looked_at + LOAD_INTERVAL)
        del self._skipped[:passed]
        if look is not None:
            if look <= now:
                self._looked_at = look
            else:
                self._reporting = True
                self._clock.at(look, self._report_load)

    def snapshot(self) -> Snapshot:
        """The answer to `GET /cache/state`."""
        return Snapshot(self.info, self._seq, self.engine.load(), tuple(self.engine.blocks()), self.engine.elsewhere())

    def keep_alive(self, now: float) -> None:
        """Report the load if nothing has been reported for a while. To be called every `KEEPALIVE_INTERVAL` / 2."""
        if self.serving and now - self._loaded_at >= KEEPALIVE_INTERVAL / 2:
            self._catch_up(now)
            self._report(now, (), self.engine.load())

    def _report(self, now: float, events: tuple[Event, ...], load: Load) -> None:
        """A batch leaves the worker."""
        self._seq += bool(events)
        self._loaded, self._loaded_at, self._looked_at = load, now, now
        batch = Batch(self.info.epoch, self._seq, events, load)
        for subscription in self.subscriptions:
            self._clock.soon(now + subscription.delay, partial(subscription.receive, batch))

    def _report_load(self, now: float) -> None:
        self._catch_up(now)
        self._reporting = False
        self._looked_at = now
        load = self.engine.load()
        if load != self._loaded and self.serving:
            self._report(now, (), load)
