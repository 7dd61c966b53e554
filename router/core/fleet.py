"""The one door to the router's core: who the workers are, what they hold, and where a request goes.

Time comes in as `now`: seconds, any origin, never going back. Nothing here waits, and nothing is kept of a request once
its ticket is released (and its blocks are confirmed or forgotten).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from kvcache.feed import Batch, Eviction, Heartbeat, Snapshot
from kvcache.keys import BlockKey
from router.core.candidates import candidates
from router.core.config import FleetConfig
from router.core.decision import CandidateView, Decision, NoWorkerReady, Reason, RouteRequest
from router.core.outliers import Ejection, Outcome
from router.core.registry import Registry
from router.core.reuse import PrefixPopularity
from router.core.strategies import Choice, Conditions, find_strategy
from router.core.ticket import Assumptions, Ticket
from router.core.work import Shape
from router.core.worker import Worker, WorkerStatus
from router.core.worker_state import Intake

__all__ = ["Fleet", "FleetConfig", "Ticket", "WorkerStatus"]

TIE_SECONDS = 1e-4
"""Costs that differ by this and half a decode step are equal: that step's end is not known any better."""


class Fleet:
    """Every worker of one model, as one router sees them.

    A worker is addressed by its URL. It is a candidate by its state (`core.candidates`), whatever is known of its
    cache. `choose` changes nothing but what time alone has made stale or certain, so a decision can be explained
    without being carried out; `dispatch` is what counts. Both are O(workers + log depth) but for the hashing of the
    prompt. Not for several threads.
    """

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self._strategy = find_strategy(config.strategy)
        self._registry = Registry(config)
        self._assumptions = Assumptions(self._registry.index, config.speculation_grace)
        self._popularity = PrefixPopularity()
        self._turn = 0
        self._tie = TIE_SECONDS + config.latency.decode / 2
        self.ready_at: float | None = None
        """When a request would last have found a worker, to the precision of `expire`; None: never yet."""

    # --- membership and life ----------------------------------------------------------------------------

    def add(self, url: str, now: float, *, feed_vouches: bool = True) -> None:
        """Discovery names a worker. Idempotent. It becomes a candidate when it is first heard from.

        `feed_vouches=False`: another process serves its feed (an agent beside the engine), so that what comes from
        there is no sign of life.
        """
        self._registry.add(url, feed_vouches)

    def remove(self, url: str, now: float) -> None:
        """Discovery names it no more: everything about it is forgotten. Its open tickets stay releasable."""
        self._registry.remove(url)

    def set_intake(self, url: str, intake: Intake) -> None:
        """What it does with new requests. Raises `UnknownWorker`."""
        self._registry.health.set_intake(self._registry.find(url), intake)

    def set_reachable(self, url: str, reachable: bool, now: float, why: str = "") -> None:
        """What a connection attempt or a health probe showed; `why` it is not. Raises `UnknownWorker`."""
        worker = self._registry.find(url)
        if reachable:
            worker.heard(now)
        else:
            worker.silence(why)
            self._registry.health.fleet_shrank()

    def heard(self, url: str, now: float) -> None:
        """Any sign of life: it is reachable. Raises `UnknownWorker`."""
        self._registry.find(url).heard(now)

    def expire(self, now: float) -> list[str]:
        """URLs of the workers that left the candidates because they were silent for `liveness_timeout`.

        Call it at least every half `liveness_timeout`. A call that comes later than that means that the caller itself
        was held up and may not have read what the workers sent: then every worker not heard from since gets one more
        period, once.
        """
        self._assumptions.expire(now)
        self._registry.health.tick(now)
        left = self._registry.expire(now)
        if candidates(self._registry):
            self.ready_at = now
        return left

    def silence(self, url: str, now: float) -> float:
        """Seconds for which a worker that left the candidates has been silent; 0 while it is alive, or unknown."""
        return self._registry.silence(url, now)

    # --- how requests fare there -------------------------------------------------------------------------

    def answered(self, url: str, outcome: Outcome, now: float) -> Ejection | None:
        """How the worker dealt with a request; its ejection, if that begins now. One that is gone is passed over."""
        worker = self._registry.get(url)
        return self._registry.health.answered(worker, outcome, now) if worker is not None else None

    def turned_away(self, url: str, retry_after: float | None, now: float) -> Ejection | None:
        """The worker takes no more for the moment (429, 503), for so many seconds if it says so. As `answered`."""
        worker = self._registry.get(url)
        return self._registry.health.turned_away(worker, retry_after, now) if worker is not None else None

    # --- the cache feed, pulled -------------------------------------------------------------------------

    def apply_snapshot(self, url: str, snapshot: Snapshot, now: float) -> None:
        """The answer of `GET /cache/state`.

        Raises `UnknownWorker`, `StaleEpoch`, and `Mismatch` or `DuplicateWorker` once its load is taken in: with these
        two the worker stays routable, but its blocks are not matched.
        """
        self._registry.apply_snapshot(url, snapshot, now)

    def apply_batch(self, url: str, batch: Batch, now: float) -> None:
        """The next batch of `GET /cache/events`.

        Raises `UnknownWorker`, `StaleEpoch`, and `FeedGap` when a snapshot must be taken first. Batches of a worker
        that is refused for matching report its load only.
        """
        self._registry.apply_batch(url, batch, now)

    # --- the cache feed, pushed -------------------------------------------------------------------------

    def apply_heartbeat(self, heartbeat: Heartbeat, now: float) -> bool:
        """Registers the worker or keeps it alive; whether it should send its whole state now.

        Raises `FeedRejected` (`Mismatch`, `StaleEpoch`, `DuplicateWorker` or a malformed URL); then nothing changed.
        """
        return self._registry.apply_heartbeat(heartbeat, now)

    def apply_sync(self, snapshot: Snapshot, now: float) -> None:
        """The whole state of a worker that sent a heartbeat before; left aside when it is older than the view or when
        the worker's own stream is live. Raises `Mismatch`, `UnknownWorker` or `StaleEpoch`; then nothing changed."""
        self._registry.apply_sync(snapshot, now)

    def apply_eviction(self, eviction: Eviction, now: float) -> None:
        """Removals since the last sync. Raises `UnknownWorker`, `StaleEpoch` or `FeedGap`; then nothing changed."""
        self._registry.apply_eviction(eviction, now)

    # --- decisions --------------------------------------------------------------------------------------

    def choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Decision:
        """Where this request should go. `exclude` holds URLs. Raises `NoWorkerReady`."""
        self._assumptions.expire(now)
        workers = self._candidates(request, exclude)
        shape = _shape(request, self.config.block_size)
        among = 0
        if shape.reusable_blocks:
            for worker in workers:
                if worker.view.usable(now):
                    among |= worker.bit
        depths: dict[int, int] = {}
        if among and request.keys is not None:
            depths = self._registry.index.depths(request.keys, among, shape.reusable_blocks)
        best = max(depths.values(), default=0)
        charge = 0.0
        if best and request.keys is not None and not self._popularity.popular(request.keys.key(best)):
            charge = self.config.recompute_charge * self.config.latency.prefill_block
        figures = tuple(
            _figures(worker, shape, depths.get(worker.view.slot, 0), best, charge, request.streaming, now)
            for worker in workers
        )
        if len(figures) == 1:
            chosen, reason = Choice(figures[0], Reason.ONLY_CANDIDATE)
        else:
            chosen, reason = self._strategy(figures, Conditions(among != 0, self._tie))
        return Decision(
            worker_id=chosen.worker_id,
            url=chosen.url,
            strategy=self.config.strategy,
            reason=reason,
            matched_blocks=chosen.matched_blocks,
            prompt_blocks=shape.prompt_blocks,
            predicted_ttft=chosen.queue_seconds + chosen.prefill_seconds,
            queue_seconds=chosen.queue_seconds,
            prefill_seconds=chosen.prefill_seconds,
            candidates=figures,
            reported_blocks=self._reported_blocks(request, chosen, now),
        )

    def _reported_blocks(self, request: RouteRequest, chosen: CandidateView, now: float) -> int:
        reported = request.reported
        if reported is None:
            return chosen.matched_blocks
        view = self._registry.find(chosen.url).view
        depths: dict[int, int] = {}
        if view.usable(now):
            depths = self._registry.index.depths(reported.keys, 1 << view.slot, reported.reusable_blocks)
        return max(depths.get(view.slot, 0), reported.fresh_blocks)

    def dispatch(self, decision: Decision, request: RouteRequest, now: float) -> Ticket:
        """The request goes to the decision's worker now. The ticket must be released, however the request ends.

        Raises `UnknownWorker` when the worker left the fleet since the decision.
        """
        worker = self._registry.find(decision.url)
        self._turn += 1
        worker.turn = self._turn
        shape = _shape(request, self.config.block_size)
        matched, keys, view = decision.matched_blocks, request.keys, worker.view
        expected = worker.work.expect(shape, matched, now)
        assumption, certain = None, False
        if keys is not None:
            best = max(candidate.matched_blocks for candidate in decision.candidates)
            if best:
                self._popularity.note(keys.key(best))
        if keys is not None and view.usable(now):
            # The request keeps the stated blocks in use, so they stay; leaving them out spares a long conversation
            # the hashing of all of its blocks each turn.
            stated = self._registry.index.stated_depth(keys, view.slot, matched)
            assumption = self._registry.index.assume(view.slot, keys.all(above=stated))
            certain = view.synced and stated == matched
        return Ticket(
            worker.work,
            expected,
            assumption,
            self._assumptions,
            worker.reuse_score,
            matched=matched,
            streaming=request.streaming,
            certain=certain,
            now=now,
        )

    @contextmanager
    def dispatching(self, decision: Decision, request: RouteRequest, clock: Callable[[], float]) -> Iterator[Ticket]:
        """`dispatch`, released however the block is left: as reused when the worker served it or a first byte came."""
        ticket = self.dispatch(decision, request, clock())
        try:
            yield ticket
        finally:
            ticket.release(clock(), reused=ticket.served or ticket.answered)

    def _candidates(self, request: RouteRequest, exclude: Collection[str]) -> list[Worker]:
        workers = candidates(self._registry, exclude)
        if not workers:
            known, ready = len(self._registry), len(candidates(self._registry))
            raise NoWorkerReady(
                f"no worker is ready: {known} known, {ready} ready, {len(exclude)} excluded",
                self.config.retry_after,
            )
        if request.model is not None and any(worker.model != workers[0].model for worker in workers):
            # A worker that has not said what it serves may serve anything; a model nobody names (an adapter, or a
            # mistake) is for any worker to answer.
            serving = [worker for worker in workers if worker.model in ("", request.model)]
            return serving or workers
        return workers

    # --- what is known ----------------------------------------------------------------------------------

    def workers(self, now: float) -> list[WorkerStatus]:
        """Every worker, candidates or not, in the order in which they joined."""
        ready = {worker.url for worker in candidates(self._registry)}
        index = self._registry.index
        return [worker.status(index, now, ready=worker.url in ready) for worker in self._registry]

    def view(self, url: str) -> dict[BlockKey, int]:
        """How many blocks of each key the worker holds, as far as the feed has said. Raises `UnknownWorker`."""
        return self._registry.index.held(self._registry.find(url).view.slot)

    @property
    def max_model_len(self) -> int | None:
        """Most tokens that any worker takes in one request; None while one of them has not said."""
        lengths = [worker.view.info.max_model_len if worker.view.info else 0 for worker in self._registry]
        return max(lengths) if lengths and all(lengths) else None

    def adopt_tokenizer(self, fingerprint: str) -> None:
        """The router's tokenizer is loaded: workers that have the same one are matched from their next snapshot on."""
        self.config = replace(self.config, fingerprint=fingerprint)
        self._registry.reconsider(self.config)

    @property
    def index_blocks(self) -> int:
        """Different blocks that any worker holds."""
        return len(self._registry.index)

    @property
    def assumed_blocks(self) -> int:
        """Different blocks assumed present because a request was sent, and not yet confirmed or given up."""
        return self._registry.index.assumed_blocks()


def _shape(request: RouteRequest, block_size: int) -> Shape:
    tokens, depth = request.prompt_tokens, request.keys.depth if request.keys is not None else 0
    if not request.prompted:
        return Shape(0, 0, 0, 0)
    if tokens is None:
        tokens = depth * block_size + 1
    return Shape(
        prompt_tokens=tokens,
        prompt_blocks=-(-tokens // block_size),
        reusable_blocks=min(depth, max(tokens - 1, 0) // block_size),
        output_tokens=request.output_tokens,
    )


def _figures(
    worker: Worker, shape: Shape, matched: int, best: int, charge: float, streaming: bool, now: float
) -> CandidateView:
    """`charge`: seconds for each block that this worker would compute though another one holds it (`best`)."""
    expected, in_flight = worker.work.expect(shape, matched, now), worker.work.in_flight()
    cost = expected.queue + expected.prefill + charge * (best - matched)
    if not streaming:
        # Its client waits for the last token, and whoever is being answered there waits for its prefill.
        cost += expected.decode + expected.prefill * in_flight
    return CandidateView(
        worker_id=worker.worker_id,
        url=worker.url,
        matched_blocks=matched,
        queue_seconds=expected.queue,
        memory_seconds=expected.memory,
        prefill_seconds=expected.prefill,
        decode_seconds=expected.decode,
        cost=cost,
        in_flight=in_flight,
        assigned_seconds=worker.work.assigned(now),
        turn=worker.turn,
    )
