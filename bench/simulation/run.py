"""One run of one strategy over one workload."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

from bench.prompts import Prompt
from bench.record import Record
from bench.simulation.clock import VirtualClock
from bench.simulation.cluster import ClusterShape, Delays, WorkerKind
from bench.simulation.errors import NO_ROUTER
from bench.simulation.request import PlayedRequest
from bench.simulation.router import SimulatedRouter
from bench.simulation.scenario import (
    CutFeed,
    Dealing,
    Event,
    Freeze,
    Join,
    Kill,
    Leave,
    RestartRouter,
    Scenario,
    Slow,
)
from bench.simulation.worker import FINGERPRINT, KEEPALIVE_INTERVAL, ProcessState, SimulatedWorker
from kvcache.keys import KEY_SCHEME, KnownKeys, PrefixKeys, pack_tokens
from router.core.decision import ANYONE, Caller, RouteRequest, Unread
from router.core.fleet import Fleet, FleetConfig
from router.core.flow import FlowPolicy

GOLDEN = 0.618033988749895
"""Its multiples modulo 1 are spread evenly; they decide which requests stream."""
DRAIN_TICK = 0.25
"""Seconds between two looks at whether a worker that leaves has no requests left."""
NEGLIGIBLE = 0.5
"""Blocks: reuse scores below it count as 0, as the operator's pod-deletion costs have it."""

UNTRACED = 100_000
"""Objects that a simulation makes before the garbage collector looks for cycles among them."""

Progress = Callable[[int, int, int], None]


@contextmanager
def _few_collections() -> Iterator[None]:
    """Objects of a simulation form next to no cycles, and with the usual thresholds the garbage collector would take an
    eighth of its time to find that out."""
    usual = gc.get_threshold()
    gc.set_threshold(UNTRACED, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class Simulation:
    """A run of one strategy over one workload. Not reusable: each run takes a new one."""

    def __init__(
        self,
        shape: ClusterShape,
        strategy: str,
        delays: Delays | None = None,
        *,
        streamed: float = 1.0,
        scenario: Scenario | None = None,
        flow: FlowPolicy | None = None,
        caller: Callable[[Prompt], Caller] | None = None,
    ) -> None:
        """`streamed`: share of the requests that ask for a stream; the other answers arrive at their end as a whole.
        `delays`: of the routers for which the scenario gives none. `scenario`: routers, and what happens during the
        run; its groups of workers are those of `shape`. `flow`: requests wait in the routers while all workers are
        busy. `caller`: who sends each request; None: all are one tenant's. Raises `ScenarioError` if it names what is
        not there."""
        self._scenario = scenario or Scenario()
        self._scenario.check(shape)
        self._shape = shape
        self._streamed = streamed
        self._caller = caller
        self._next: Callable[[float], None] | None = None
        """Sends the next request of a closed loop when one is answered; None: the loop is open."""
        self._clock = VirtualClock()
        self._known = KnownKeys()
        self.workers: list[SimulatedWorker] = []
        """All that ever were, one for each rank."""
        self._by_url: dict[str, SimulatedWorker] = {}
        """Those that have not left."""
        self._open = 0
        """Requests that have come and not ended."""
        self._to_come = True
        self.records: list[Record] = []
        """In the order of their ends."""
        self._random = Random(f"dealing {self._scenario.routers.seed}")
        config = FleetConfig(
            block_size=shape.engine.block_size,
            fingerprint=FINGERPRINT,
            key_scheme=KEY_SCHEME,
            model=shape.model,
            strategy=strategy,
            latency=shape.latency,
        )
        self.routers = [
            SimulatedRouter(number, self._clock, config, each, self._busy, flow)
            for number, each in enumerate(self._scenario.routers.delays(delays or Delays()))
        ]
        for kind in shape.kinds():
            self._join(kind, 0.0, known=True)
        for event in self._scenario.events:
            self._clock.at(event.at, partial(self._happen, event))

    @property
    def fleets(self) -> list[Fleet]:
        """What each router knows now."""
        return [router.fleet for router in self.routers]

    @property
    def worker_ids(self) -> list[str]:
        """The workers, as records name them."""
        return [worker.info.worker_id for worker in self.workers]

    # --- the workload ---

    def run(self, prompts: Iterable[Prompt], progress: Progress) -> list[Record]:
        """Play the whole workload. Returns the records in its order. `progress` takes (sent, answered, failed)."""
        coming = iter(prompts)
        sent = 0

        def arrive(prompt: Prompt, now: float) -> None:
            nonlocal sent
            sent += 1
            self._arrive(now, prompt)
            progress(sent, len(self.records), 0)
            prepare()

        def prepare() -> None:
            following = next(coming, None)
            if following is None:
                self._to_come = False
            else:
                self._clock.at(following.request.at, partial(arrive, following))

        prepare()
        self._play()
        progress(sent, len(self.records), 0)
        return sorted(self.records, key=lambda record: record.index)

    def run_closed(self, prompts: Iterable[Prompt], clients: int, seconds: float) -> list[Record]:
        """For `seconds`, `clients` clients send the prompts, each the next one as soon as it has an answer; the arrival
        times of the workload are not used. Returns the records of the requests that were answered by then."""
        coming = iter(prompts)

        def send_next(now: float) -> None:
            following = next(coming, None) if now < seconds else None
            self._to_come = following is not None
            if following is not None:
                self._arrive(now, following)

        self._next = send_next
        for client in range(clients):
            self._clock.at(client * 0.001, send_next)
        self._play()
        answered = [record for record in self.records if record.finished is not None and record.finished <= seconds]
        return sorted(answered, key=lambda record: record.index)

    def _play(self) -> None:
        self._clock.at(KEEPALIVE_INTERVAL, self._housekeep)
        with _few_collections():
            self._clock.play()

    def _busy(self) -> bool:
        """Whether requests are to come or to end."""
        return self._to_come or self._open > 0

    def _arrive(self, now: float, prompt: Prompt) -> None:
        """A request arrives at the routers' Service."""
        self._open += 1
        router = self._deal(prompt.request.index)
        if router is None:
            lost = Record(prompt.request.index, prompt.request.at, now, error=NO_ROUTER.cause, detail=NO_ROUTER.detail)
            self._ended(lost, now)
            return
        streaming = prompt.request.index * GOLDEN % 1.0 < self._streamed
        PlayedRequest(prompt, self._route(prompt, streaming), router, self._by_url, self._ended).arrive(now)

    def _route(self, prompt: Prompt, streaming: bool) -> RouteRequest:
        """What a router reads of it (`router.server.prompts`): not the prompt, if no worker would take it."""
        output_tokens = prompt.request.max_tokens
        if len(prompt.tokens) > self._shape.max_model_len:
            return RouteRequest(None, None, streaming, output_tokens=output_tokens, unread=Unread.TOO_LONG)
        keys = PrefixKeys(pack_tokens(prompt.tokens), self._shape.engine.block_size, prompt.scope)
        keys.compute_with(self._known)  # once: the engine needs all of them
        caller = self._caller(prompt) if self._caller is not None else ANYONE
        return RouteRequest(keys, len(prompt.tokens), streaming, output_tokens=output_tokens, caller=caller)

    def _deal(self, index: int) -> SimulatedRouter | None:
        """The router that gets the request; None: none serves."""
        routers = self.routers
        if len(routers) == 1:
            return routers[0] if routers[0].serving else None
        serving = [router for router in routers if router.serving]
        if not serving:
            return None
        if self._scenario.routers.dealing is Dealing.RANDOM:
            return self._random.choice(serving)
        return serving[index % len(serving)]

    def _ended(self, record: Record, now: float) -> None:
        self._open -= 1
        self.records.append(record)
        if self._next is not None:
            self._next(now)

    def _housekeep(self, now: float) -> None:
        """What recurs: each worker's feed sends a batch every `KEEPALIVE_INTERVAL` or sooner, and routers look for what
        has a time-out."""
        for worker in self.workers:
            worker.keep_alive(now)
        for router in self.routers:
            router.tick(now)
        if self._busy():
            self._clock.at(now + KEEPALIVE_INTERVAL / 2, self._housekeep)

    # --- what happens to the cluster ---

    def _join(self, kind: WorkerKind, now: float, *, known: bool = False) -> None:
        """A worker joins, with all its ranks and empty caches."""
        number = len(self.workers) // self._shape.ranks
        for rank in range(self._shape.ranks):
            worker = SimulatedWorker(self._clock, number, rank, self._shape, kind, leaps=not self._scenario.events)
            self.workers.append(worker)
            self._by_url[worker.url] = worker
            for router in self.routers:
                router.discover(worker, now, known=known)

    def _ranks(self, name: str) -> list[SimulatedWorker]:
        """The ranks of the worker of this name."""
        ranks = self._shape.ranks
        number = int(name.removeprefix("worker-"))
        return self.workers[number * ranks : (number + 1) * ranks]

    def _happen(self, event: Event, now: float) -> None:
        match event:
            case Kill(worker=name):
                for worker in self._ranks(name):
                    worker.kill(now)
                    if event.restart_after is not None:
                        self._clock.at(now + event.restart_after, partial(self._restart, worker))
            case Freeze(worker=name):
                for worker in self._ranks(name):
                    worker.freeze(now)
                    self._clock.at(now + event.seconds, worker.thaw)
            case Slow(worker=name):
                for worker in self._ranks(name):
                    worker.change_speed(event.speed)
                    self._clock.at(now + event.seconds, partial(_recover, worker))
            case Join():
                kind = self._shape.kind if event.group is None else self._group(event.group)
                for _ in range(event.count):
                    self._join(kind, now)
            case Leave():
                for number in self._leavers(event, now):
                    self._drain(self._ranks(f"worker-{number}"), now + event.grace, now)
            case RestartRouter():
                router = self.routers[event.router]
                router.kill(now)
                self._clock.at(now + event.down_for, lambda then: router.start(self._by_url, then))
            case CutFeed():
                self._cut(event, now)

    def _restart(self, worker: SimulatedWorker, now: float) -> None:
        if self._by_url.get(worker.url) is worker:  # it has not left meanwhile
            worker.start(now)

    def _group(self, name: str) -> WorkerKind:
        return next(group.kind for group in self._shape.groups if group.name == name)

    def _cut(self, event: CutFeed, now: float) -> None:
        routers = self.routers if event.router is None else [self.routers[event.router]]
        workers = self.workers if event.worker is None else self._ranks(event.worker)
        for router in routers:
            for worker in workers:
                link = router.links.get(worker.url)
                if link is not None:
                    link.cut(now)
                    self._clock.at(now + event.seconds, link.connect)

    def _leavers(self, event: Leave, now: float) -> list[int]:
        """The workers that leave: those named, else those whose caches the routers make least use of, of equal ones the
        youngest (the operator's pod-deletion cost and the ReplicaSet's order)."""
        if event.worker is not None:
            return [int(event.worker.removeprefix("worker-"))]
        scores: dict[int, float] = {}
        for worker in self._by_url.values():
            if worker.state is ProcessState.RUNNING:
                scores.setdefault(worker.number, 0.0)
        for router in self.routers:
            for status in router.fleet.workers(now):
                number = self._by_url[status.url].number if status.url in self._by_url else -1
                if number in scores:
                    scores[number] += status.reuse_score
        order = sorted(scores, key=lambda number: (max(scores[number], NEGLIGIBLE), -number))
        return order[: event.count]

    def _drain(self, ranks: list[SimulatedWorker], until: float, now: float) -> None:
        """The worker is told to leave: routers learn it after the network's delay."""
        for worker in ranks:
            worker.drain()
            for router in self.routers:
                self._clock.at(now + router.delays.network, partial(router.drain, worker.url))
        self._clock.at(now + 2 * DRAIN_TICK, partial(self._drained, ranks, until))

    def _drained(self, ranks: list[SimulatedWorker], until: float, now: float) -> None:
        """The worker ends when it has no requests, or at the end of its grace period."""
        if now < until and not all(worker.idle or worker.state is ProcessState.STOPPED for worker in ranks):
            self._clock.at(min(now + DRAIN_TICK, until), partial(self._drained, ranks, until))
            return
        for worker in ranks:
            if worker.state is not ProcessState.STOPPED:
                worker.kill(now)
            for router in self.routers:
                self._clock.at(now + router.delays.network, partial(router.forget, worker.url))
            self._clock.at(now + 2 * DRAIN_TICK, partial(self._left, worker.url))

    def _left(self, url: str, now: float) -> None:
        self._by_url.pop(url, None)


def _recover(worker: SimulatedWorker, now: float) -> None:
    worker.change_speed(1.0)
