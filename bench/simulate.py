"""A cluster on a virtual clock: the product's own engine and router core, without processes, sockets or waiting.

Everything that decides is the code that serves real traffic (`worker.emulator.engine.Engine`, `router.core.Fleet`);
only time is not real. A heap holds what happens next: a request arrives at the router, reaches its worker, an engine's
step ends, a batch of the cache feed reaches the router. Each engine is advanced to the end of each of its steps, so
the router learns of every block exactly when a live feed with the same delay would have told it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count as counter

from bench.prompts import Prompt
from bench.record import Record
from kvcache.feed import Batch, Event, Load, Snapshot, Tier, WorkerInfo
from kvcache.keys import KEY_SCHEME, PrefixKeys, pack_tokens
from kvcache.profiles import LatencyModel
from kvcache.ranks import rank_id, rank_url
from router.core.decision import Decision, RouteRequest
from router.core.fleet import Fleet, FleetConfig, Ticket
from router.core.latency_samples import Usage
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest, Output


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """The cluster that a simulation or a replay emulates, as a manifest describes it."""

    workers: int
    engine: EngineConfig
    latency: LatencyModel
    model: str
    tokenizer: str = "gpt2"
    speeds: tuple[float, ...] = ()
    """By which factor each worker is faster than `latency` says; workers beyond the end of the tuple are as fast as it
    says."""
    ranks: int = 1
    """Engines of each worker."""

    def latency_of(self, worker: int) -> LatencyModel:
        """The latency of the engine of worker `worker` (from 0). The router is told `latency` for all of them."""
        return self.latency.scaled(self.speeds[worker]) if worker < len(self.speeds) else self.latency

    @property
    def capacity(self) -> int:
        """Blocks of all engines together, their copies on the CPU included."""
        return self.workers * self.ranks * (self.engine.blocks + self.engine.cpu_blocks)


class SeededTokens:
    """The generated tokens of one request: they differ between requests, so that no prompt hits the blocks of another
    request's answer."""

    __slots__ = ("_seed",)

    def __init__(self, index: int) -> None:
        self._seed = index * 2_654_435_761

    def token(self, index: int) -> int:
        """Never an end-of-sequence token, because the workload sets the lengths."""
        return 512 + ((self._seed + index * 40_503) >> 4) % 16_384


LOAD_INTERVAL = 0.02
"""Least seconds between two load reports without cache events, as in a worker's feed."""
KEEPALIVE_INTERVAL = 1.0
"""Most seconds between two batches of a worker's feed."""
GOLDEN = 0.618033988749895
"""Its multiples modulo 1 are spread evenly; they decide which requests stream."""
EPOCH = 1
FINGERPRINT = "simulated"


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays between router and workers, one way, in seconds."""

    network: float = 0.001
    feed: float = 0.001


@dataclass(slots=True)
class _InFlight:
    """One request between its arrival and the end of its answer."""

    prompt: Prompt
    decision: Decision
    ticket: Ticket
    sent: float
    streaming: bool
    first_token: float = 0.0


class _Worker:
    """One engine (a worker, or a data-parallel rank of one) and its end of the cache feed."""

    __slots__ = ("engine", "info", "loaded", "loaded_at", "looked_at", "reporting", "seq", "url", "wakes")

    def __init__(self, number: int, rank: int, shape: ClusterShape) -> None:
        self.url = rank_url(f"http://worker-{number}", rank)
        self.engine = Engine(shape.engine, shape.latency_of(number))
        self.info = WorkerInfo(
            worker_id=rank_id(f"worker-{number}", rank, shape.ranks),
            epoch=EPOCH,
            model=shape.model,
            block_size=shape.engine.block_size,
            fingerprint=FINGERPRINT,
            key_scheme=KEY_SCHEME,
            capacity=shape.engine.blocks,
            max_model_len=shape.engine.max_model_len,
            rank=rank,
            ranks=shape.ranks,
            tier_seconds={Tier.CPU: shape.engine.cpu_block_seconds} if shape.engine.cpu_blocks else {},
            groups=shape.engine.groups,
        )
        self.seq = 0
        self.loaded: Load = self.engine.load()
        """As last reported."""
        self.loaded_at = 0.0
        self.looked_at = 0.0
        """When the load was last compared with the one reported."""
        self.reporting = False
        """Whether a comparison of the load is on the heap."""
        self.wakes: float | None = None
        """End of the step in progress, if it is on the heap."""


class Simulation:
    """A run of one strategy over one workload. Not reusable: each run takes a new one."""

    def __init__(
        self,
        shape: ClusterShape,
        strategy: str,
        delays: Delays,
        *,
        streamed: float = 1.0,
        routers: int = 1,
        joining: Sequence[float] = (),
    ) -> None:
        """`streamed`: share of the requests that ask for a stream; the other answers arrive at their end as a whole.
        `routers`: how many there are; they get the requests in turn and know of one another only by the feeds.
        `joining`: times at which further workers, with empty caches, join those of the shape."""
        self._shape = shape
        self._delays = delays
        self._streamed = streamed
        self._next: Callable[[float], None] | None = None
        """Sends the next request of a closed loop when one is answered; None: the loop is open."""
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = counter()
        self.workers: list[_Worker] = []
        self._by_url: dict[str, _Worker] = {}
        self._in_flight: dict[str, _InFlight] = {}
        self._to_come = True
        self.records: list[Record] = []
        config = FleetConfig(
            block_size=shape.engine.block_size,
            fingerprint=FINGERPRINT,
            key_scheme=KEY_SCHEME,
            model=shape.model,
            strategy=strategy,
            latency=shape.latency,
        )
        self.fleets = [Fleet(config) for _ in range(routers)]
        """One for each router."""
        for number in range(shape.workers):
            self._join(number, 0.0)
        for number, when in enumerate(joining, start=shape.workers):
            self._at(when, partial(self._join, number))

    def _join(self, number: int, now: float) -> None:
        """Worker `number` joins, with all its ranks."""
        for rank in range(self._shape.ranks):
            worker = _Worker(number, rank, self._shape)
            self.workers.append(worker)
            self._by_url[worker.url] = worker
            for fleet in self.fleets:
                fleet.add(worker.url)
                fleet.apply_snapshot(worker.url, Snapshot(worker.info, 0, worker.loaded, ()), now)

    @property
    def worker_ids(self) -> list[str]:
        """The workers, as records name them."""
        return [worker.info.worker_id for worker in self.workers]

    def run(self, prompts: Iterable[Prompt], progress: Callable[[int, int, int], None]) -> list[Record]:
        """Play the whole workload. Returns the records in its order. `progress` takes (sent, answered, failed)."""
        coming = iter(prompts)
        sent = 0

        def arrive(now: float, prompt: Prompt) -> None:
            nonlocal sent
            sent += 1
            self._arrive(now, prompt)
            progress(sent, len(self.records), 0)
            following = next(coming, None)
            if following is None:
                self._to_come = False
            else:
                self._at(following.request.at, lambda then: arrive(then, following))

        first = next(coming)
        self._at(first.request.at, lambda now: arrive(now, first))
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
            self._at(client * 0.001, send_next)
        self._play()
        answered = [record for record in self.records if record.finished is not None and record.finished <= seconds]
        return sorted(answered, key=lambda record: record.index)

    def _play(self) -> None:
        """Let everything happen that is to happen, until nothing is left."""
        self._at(KEEPALIVE_INTERVAL, self._housekeep)
        heap = self._heap
        while heap:
            now, _, happen = heappop(heap)
            happen(now)

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heappush(self._heap, (when, next(self._order), happen))

    # --- the router's side ---------------------------------------------------------------------------------------

    def _arrive(self, now: float, prompt: Prompt) -> None:
        """A request arrives at the router, which decides and sends it to a worker."""
        keys = PrefixKeys(pack_tokens(prompt.tokens), self._shape.engine.block_size, prompt.scope)
        streaming = prompt.request.index * GOLDEN % 1.0 < self._streamed
        request = RouteRequest(
            keys=keys,
            prompt_tokens=len(prompt.tokens),
            streaming=streaming,
            output_tokens=prompt.request.max_tokens,
        )
        fleet = self.fleets[prompt.request.index % len(self.fleets)]
        decision = fleet.choose(request, now)
        ticket = fleet.dispatch(decision, request, now)
        self._in_flight[str(prompt.request.index)] = _InFlight(prompt, decision, ticket, now, streaming)
        worker = self._by_url[decision.url]
        engine_request = EngineRequest(
            request_id=str(prompt.request.index),
            prompt=prompt.tokens,
            max_tokens=prompt.request.max_tokens,
            source=SeededTokens(prompt.request.index),
            scope=prompt.scope,
            ignore_eos=True,
        )
        self._at(now + self._delays.network, lambda then: self._submit(then, worker, engine_request))

    def _report(self, now: float, worker: _Worker, events: tuple[Event, ...], load: Load) -> None:
        """A batch leaves the worker; it reaches the router after the feed's delay."""
        worker.seq += bool(events)
        worker.loaded, worker.loaded_at, worker.looked_at = load, now, now
        batch = Batch(EPOCH, worker.seq, events, load)

        def arrive(then: float) -> None:
            for fleet in self.fleets:
                fleet.apply_batch(worker.url, batch, then)

        self._at(now + self._delays.feed, arrive)

    # --- the workers' side ---------------------------------------------------------------------------------------

    def _submit(self, now: float, worker: _Worker, request: EngineRequest) -> None:
        worker.engine.submit(request, now)
        self._advance(now, worker)

    def _advance(self, now: float, worker: _Worker) -> None:
        """Advance the engine to `now`, pass its outputs on, and schedule the end of its next step."""
        if worker.wakes is not None and worker.wakes <= now:
            worker.wakes = None
        for output in worker.engine.advance(now):
            if output.index == 0 or output.finish_reason is not None:
                self._answer(worker, output)
        worker.engine.take_finished()
        events = tuple(feed_events(worker.engine.take_events()))
        if events:
            self._report(now, worker, events, worker.engine.load())
        elif not worker.reporting:
            worker.reporting = True
            self._at(max(now, worker.looked_at + LOAD_INTERVAL), lambda then: self._report_load(then, worker))
        due = worker.engine.next_event()
        if due is not None and due != worker.wakes:
            worker.wakes = due
            self._at(due, lambda then: self._wake(then, worker))

    def _wake(self, now: float, worker: _Worker) -> None:
        if worker.wakes == now:  # otherwise a request that came at the end of the step has completed it
            self._advance(now, worker)

    def _report_load(self, now: float, worker: _Worker) -> None:
        worker.reporting = False
        worker.looked_at = now
        load = worker.engine.load()
        if load != worker.loaded:
            self._report(now, worker, (), load)

    def _housekeep(self, now: float) -> None:
        """Each worker's feed sends a batch every `KEEPALIVE_INTERVAL` or sooner; routers look for silent workers."""
        for worker in self.workers:
            if now - worker.loaded_at >= KEEPALIVE_INTERVAL / 2:
                self._report(now, worker, (), worker.engine.load())
        for fleet in self.fleets:
            fleet.expire(now)
        if self._to_come or self._in_flight:
            self._at(now + KEEPALIVE_INTERVAL / 2, self._housekeep)

    def _answer(self, worker: _Worker, output: Output) -> None:
        """The first or the last token of an answer: the router sees it after the network's delay."""
        flight = self._in_flight[output.request_id]
        seen = output.at + self._delays.network
        ticket = flight.ticket
        if output.index == 0:
            flight.first_token = seen
            if flight.streaming:
                self._at(seen, ticket.first_token)
        if output.finish_reason is not None:
            del self._in_flight[output.request_id]
            usage = Usage(len(flight.prompt.tokens), output.index + 1, output.cached_tokens)
            self._at(seen, lambda then: self._finish(then, ticket, usage))
            request = flight.prompt.request
            self.records.append(
                Record(
                    index=request.index,
                    scheduled=request.at,
                    sent=flight.sent,
                    first_token=flight.first_token,
                    finished=seen,
                    worker=worker.info.worker_id,
                    reason=flight.decision.reason.value,
                    matched_blocks=flight.decision.matched_blocks,
                    prompt_tokens=len(flight.prompt.tokens),
                    cached_tokens=output.cached_tokens,
                    output_tokens=output.index + 1,
                )
            )

    def _finish(self, now: float, ticket: Ticket, usage: Usage) -> None:
        ticket.finished(now, usage)
        ticket.release(now)
        if self._next is not None:
            self._next(now)
