"""The entry point of the router's core: who the workers are, what they hold, and where a request goes.

Time is passed in as `now`: seconds from any origin, never decreasing. Nothing here waits, and nothing is kept of a
request once its ticket is released and its blocks are confirmed or given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from kvcache.feed import Batch, Eviction, Heartbeat, Snapshot, Tier, WorkerInfo
from kvcache.keys import BlockKey
from kvcache.ranks import rank_url
from router.core.catalogue import OWN_TOKENIZER, Candidates, Directory
from router.core.chooser import MANY, Chooser
from router.core.circuits import Circuits
from router.core.config import FleetConfig
from router.core.decision import Decision, RouteRequest
from router.core.errors import FeedRejected, RejectReason, UnknownWorker
from router.core.history import History
from router.core.index import PrefixIndex
from router.core.outliers import Ejection, Outcome
from router.core.ownership import Owners
from router.core.reuse import PrefixPopularity, ReuseScore
from router.core.sessions import SessionTable
from router.core.shape import shape_of
from router.core.standing import Changes
from router.core.stored_responses import holders
from router.core.strategies import candidates
from router.core.ticket import Assumptions, Ticket
from router.core.unobserved import Reported
from router.core.view import View
from router.core.work import Learnt, Work
from router.core.worker import Worker, WorkerStatus
from router.core.worker_state import Intake, Liveness, WorkerPhase

__all__ = ["Fleet", "FleetConfig", "Ticket", "WorkerStatus"]

MAX_URL = 2048
"""Characters of a URL that a heartbeat may state."""

_ROUTED_BY_LOAD = (RejectReason.NO_TOKENIZER, RejectReason.MODEL)
"""Why a worker that pushes is not matched, and gets requests all the same."""


class Fleet:
    """Every worker of one model, as one router sees them.

    A worker is addressed by its URL; the ranks of one process are workers at one address (`kvcache.ranks`). Its state
    decides whether it is a candidate (`candidates`), whatever is known of its cache. `choose` changes nothing except
    what time alone has made stale or certain, so a decision can be explained without being carried out; `dispatch`
    carries it out. Both are O(workers + log depth), apart from hashing the prompt. Not thread-safe.
    """

    def __init__(self, config: FleetConfig, many: int = MANY) -> None:
        """`many`: from so many candidates on, a decision computes with all of them at once."""
        self.config = config
        self.ready_at: float | None = None
        """When a request would last have found a worker, to the precision of `expire`; None: never yet."""
        self._workers: dict[str, Worker] = {}
        self._owners = Owners(self._workers.values())
        self._changes = Changes()
        self.directory = Directory(
            self._workers, config.model, lambda info: self.config.tokenizer_of(info), self._changes
        )
        self._index = PrefixIndex()
        self._learnt = Learnt(config)
        self._circuits = Circuits(config, self._workers.values())
        self._assumptions = Assumptions(self._index, config.speculation_grace)
        self._popularity = PrefixPopularity(config.recompute_charge, config.popular_charge)
        self.sessions = SessionTable(config.session_ttl, config.session_limit)
        self._expired_at: float | None = None
        self._turn = 0
        self._chooser = Chooser(
            config, self._workers, self._index, self._popularity, self.sessions, self._learnt, self._changes, many
        )

    # --- the workers ------------------------------------------------------------------------------------

    def add(self, url: str, *, feed_proves_liveness: bool = True) -> None:
        """Discovery names a worker. Idempotent. It becomes a candidate when it is first heard from.

        `feed_proves_liveness=False`: another process serves its feed (an agent beside the engine), so messages of the
        feed are no sign of life.
        """
        worker = self._workers.get(url) or self._join(url)
        worker.discovered = True
        worker.feed_proves_liveness = feed_proves_liveness

    def remove(self, url: str) -> None:
        """Discovery no longer names the worker: everything about it is forgotten. Its open tickets stay releasable."""
        worker = self._workers.pop(url, None)
        if worker is not None:
            self._owners.disown(worker)
            worker.close()
            self._changes.members += 1
            self.directory.changed()
            self._circuits.fleet_shrank()

    def set_intake(self, url: str, intake: Intake) -> None:
        """The worker takes new requests, drains or takes none. Raises `UnknownWorker`."""
        self._find(url).set_intake(intake)
        self._circuits.fleet_shrank()

    def mark_alive(self, url: str, now: float) -> None:
        """The worker gave a sign of life: it answered a probe, or its feed did. Raises `UnknownWorker`."""
        self._find(url).mark_alive(now)

    def mark_unreachable(self, url: str, why: str = "") -> None:
        """The worker refused a connection or a probe, for the reason `why`. Raises `UnknownWorker`."""
        worker = self._find(url)
        worker.mark_unreachable(why)
        if worker.history is not None:
            worker.history.clear()  # nothing listens there: the next process has another cache
        self._circuits.fleet_shrank()

    def set_feedless(self, url: str, *, feedless: bool) -> None:
        """The worker serves no cache feed, or serves one again. Without one, prompts are matched against what this
        router has sent there. Of a worker whose feed has been heard, that it has none changes nothing: it has stopped,
        and what it said is not confirmed any more. Raises `UnknownWorker`."""
        worker = self._find(url)
        if feedless and worker.history is None and worker.view.info is None:
            worker.history = History(self._index, worker.view.slot, self.config.history_blocks)
        elif not feedless and worker.history is not None:
            worker.history.clear()
            worker.history = None

    def expire(self, now: float) -> list[str]:
        """End what time has ended. Returns the URLs of workers that became unreachable now, because they were silent
        for longer than `liveness_timeout`.

        Call it at least every half `liveness_timeout`. If a call comes later, the caller itself was held up and may not
        have read what the workers sent: every worker that was not heard from since then gets one more period, once.
        """
        self._assumptions.expire(now)
        self._circuits.tick(now)
        self.sessions.expire(now)
        timeout = self.config.liveness_timeout
        late = self._expired_at is not None and now - self._expired_at > timeout / 2
        self._expired_at = now
        left, forgotten = [], []
        for worker in self._workers.values():
            worker.work.expire_report(now)
            silent = now - worker.heard_at
            if not worker.reachable:
                if not worker.discovered and silent > self.config.forget_after:
                    forgotten.append(worker.url)
            elif late and worker.state.liveness is not Liveness.OVERDUE:
                worker.excuse(now)
            elif silent > timeout:
                worker.mark_unreachable(f"it has been silent for more than {timeout:g} s")
                left.append(worker.url)
        if left:
            self._circuits.fleet_shrank()
        for url in forgotten:
            self.remove(url)
        if self.any_ready:
            self.ready_at = now
        return left

    @property
    def any_ready(self) -> bool:
        """Whether a worker is ready, whatever it serves. O(workers)."""
        return bool(candidates(self._workers.values()))

    def reported(self, url: str, now: float) -> Reported | None:
        """How many requests the worker last reported; None: it reported nothing, or too long ago, or it is unknown."""
        worker = self._workers.get(url)
        if worker is None or worker.work.load is None:
            return None
        work, load = worker.work, worker.work.load
        return Reported(load.running + load.waiting, work.report_age(now) or 0.0, work.ledger.in_flight)

    def urls(self) -> Iterable[str]:
        """Of every worker."""
        return self._workers.keys()

    def silent_for(self, url: str, now: float) -> float:
        """Seconds for which an unreachable worker has been silent; 0 while it is reachable, or if it is unknown."""
        worker = self._workers.get(url)
        return now - worker.heard_at if worker is not None and worker.phase is WorkerPhase.UNREACHABLE else 0.0

    def _own(self, worker: Worker, info: WorkerInfo) -> None:
        replaced = self._owners.own(worker, info)
        if replaced is not None and not replaced.discovered:
            self.remove(replaced.url)

    def _find(self, url: str) -> Worker:
        worker = self._workers.get(url)
        if worker is None:
            raise UnknownWorker(f"no worker is known at {url!r:.200}: add it to discovery or send a heartbeat first")
        return worker

    def _join(self, url: str) -> Worker:
        config = self.config
        worker = Worker(
            url,
            View(self._index, config.view_timeout, config.block_size, self._changes),
            Work(config, self._learnt, self._changes),
            ReuseScore(config.reuse_half_life),
            self._changes,
        )
        self._workers[url] = worker
        self._changes.members += 1
        self.directory.changed()
        return worker

    # --- outcomes of requests ----------------------------------------------------------------------------

    def answered(self, url: str, outcome: Outcome, now: float) -> Ejection | None:
        """The worker dealt with a request in this way. Returns its ejection, if that begins now. Does nothing if the
        worker has left the fleet."""
        worker = self._workers.get(url)
        return self._circuits.answered(worker, outcome, now) if worker is not None else None

    def turned_away(self, url: str, retry_after: float | None, now: float) -> Ejection | None:
        """The worker turned a request away (429, 503), and asks for no more within `retry_after` seconds, if it says
        so. Returns as `answered` does."""
        worker = self._workers.get(url)
        return self._circuits.turned_away(worker, retry_after, now) if worker is not None else None

    # --- the cache feed, pulled -------------------------------------------------------------------------

    def apply_snapshot(self, url: str, snapshot: Snapshot, now: float) -> None:
        """The answer of `GET /cache/state`.

        Raises `UnknownWorker` or `StaleEpoch`, and then nothing changed. Raises `Mismatch`, `DuplicateWorker` or
        `AgentListed` after the worker's load is taken in: its blocks are not matched, but (unless it is an agent) it
        gets requests by load.
        """
        self.set_feedless(url, feedless=False)
        worker = self._find(url)
        view, info = worker.view, snapshot.info
        if worker.reachable:
            # One that was unreachable may be any incarnation now, even with a smaller epoch: clocks can be set back.
            view.check_epoch(info.epoch)
        worker.feed_received(now)
        conflict = worker.detect_agent(info) or self._owners.conflict(worker, info)
        if conflict is None:
            self._own(worker, info)
        else:
            self._owners.disown(worker)
        worker.update(info, snapshot.load, now)
        self.directory.changed()
        refusal = conflict or self.config.mismatch(info)
        if refusal is not None:
            view.refuse(refusal)
            raise refusal
        view.install(snapshot, now)
        view.pulled_at = now

    def apply_batch(self, url: str, batch: Batch, now: float) -> None:
        """The next batch of `GET /cache/events`.

        Raises `UnknownWorker`, `StaleEpoch`, and `FeedGap` when a snapshot must be taken first. A batch of a worker
        whose view is refused updates its load only.
        """
        worker = self._find(url)
        worker.view.check_epoch(batch.epoch)
        worker.feed_received(now)
        before = worker.view.info
        worker.view.apply(batch, now)
        if worker.view.info is not before:
            self.directory.changed()
        worker.view.pulled_at = now
        worker.work.report(batch.load, now)

    # --- the cache feed, pushed -------------------------------------------------------------------------

    def apply_heartbeat(self, heartbeat: Heartbeat, now: float) -> bool:
        """The worker is alive; a new one joins the fleet. Returns whether it should send its whole state now.

        Raises `FeedRejected` (`Mismatch`, `StaleEpoch`, `DuplicateWorker` or a malformed URL); then nothing changed.
        """
        info, address = heartbeat.info, heartbeat.url.rstrip("/")
        refusal = self.config.mismatch(info)
        if refusal is not None and refusal.reason not in _ROUTED_BY_LOAD:
            raise refusal
        if not address.startswith(("http://", "https://")) or "#" in address or len(address) > MAX_URL:
            raise FeedRejected(RejectReason.MALFORMED, f"url must look like http://host:port, not {address!r:.200}")
        url = rank_url(address, info.rank)
        owner = self._owners.get(info.worker_id)
        worker = self._workers.get(url)
        if owner is not None:
            owner.view.check_epoch(info.epoch)
            if owner.view.epoch == info.epoch:
                worker = owner  # one process; discovery may know it by another name of the same address
        if worker is None:
            worker = self._join(url)
        else:
            worker.view.check_epoch(info.epoch)
        self._own(worker, info)
        worker.mark_alive(now)
        if worker.update(info, heartbeat.load, now):
            self.directory.changed()
        view = worker.view
        if refusal is not None:
            view.refuse(refusal)
            return False
        view.confirm(heartbeat.seq, now)
        return not view.exact and not self._streams(worker, now)

    def apply_sync(self, snapshot: Snapshot, now: float) -> None:
        """The whole state of a worker that sent a heartbeat before. It is ignored if it is older than the view, or if
        the worker's own stream is live. Raises `Mismatch`, `UnknownWorker` or `StaleEpoch`; then nothing changed."""
        refusal = self.config.mismatch(snapshot.info)
        if refusal is not None and refusal.reason not in _ROUTED_BY_LOAD:
            raise refusal
        worker = self._owners.find(snapshot.info.worker_id)
        worker.view.check_epoch(snapshot.info.epoch)
        worker.mark_alive(now)
        if worker.update(snapshot.info, snapshot.load, now):
            self.directory.changed()
        if refusal is not None:
            worker.view.refuse(refusal)
        elif not self._streams(worker, now):
            worker.view.install(snapshot, now)

    def apply_eviction(self, eviction: Eviction, now: float) -> None:
        """Removals since the last sync. Raises `UnknownWorker`, `StaleEpoch` or `FeedGap`; then nothing changed."""
        worker = self._owners.find(eviction.worker_id)
        worker.view.check_epoch(eviction.epoch)
        if not self._streams(worker, now):
            worker.view.evict(eviction)
        worker.mark_alive(now)

    def _streams(self, worker: Worker, now: float) -> bool:
        """Whether the worker's own stream is live, which is more recent than any push."""
        pulled = worker.view.pulled_at
        return pulled is not None and worker.view.exact and now - pulled <= self.config.liveness_timeout

    # --- decisions --------------------------------------------------------------------------------------

    def choose(
        self,
        request: RouteRequest,
        now: float,
        exclude: Collection[str] = (),
        lap: Callable[[], None] | None = None,
        *,
        explain: bool = False,
    ) -> Decision:
        """Where this request should go; not to `exclude` (URLs). `lap` is called between the search of the index
        and the choice. `explain`: with the figures of every candidate, also in a large fleet. Raises `NoWorkerReady`,
        or `HolderGone` if no known worker has the stored response."""
        self._assumptions.expire(now)
        return self._chooser.choose(request, self._candidates(request, exclude), now, lap, explain=explain)

    def dispatch(self, decision: Decision, request: RouteRequest, now: float) -> Ticket:
        """The request goes to the decision's worker now. The ticket must be released, however the request ends.

        Raises `UnknownWorker` when the worker left the fleet since the decision.
        """
        worker = self._find(decision.url)
        self._turn += 1
        worker.turn = self._turn
        if request.session is not None:
            self.sessions.note(request.session, decision.url, now)
        worker.work.take_sample(now)
        shape = shape_of(request, self.config.block_size, self._learnt.lengths)
        matched, keys, view = decision.matched_blocks, request.keys, worker.view
        loaded = decision.loaded_blocks
        if loaded:
            expected = worker.work.expect(shape, matched, now, sum(loaded.values()), view.load_seconds(loaded))
        else:
            expected = worker.work.expect(shape, matched, now)
        assumption, certain = None, False
        if keys is not None and decision.best_blocks:
            self._popularity.note(keys.key(decision.best_blocks))
        if keys is not None and view.usable(now):
            # Blocks that the worker states to hold stay, because the request uses them. Not assuming them saves hashing
            # all blocks of a long conversation at each turn.
            # Of a history all are noted, for they count as used now.
            stated = self._index.stated_depth(keys, view.slot, matched)
            assumption = self._index.assume_prompt(view.slot, keys, 0 if worker.history is not None else stated)
            certain = view.exact and stated == matched
        return Ticket(
            worker.work,
            expected,
            assumption,
            self._assumptions if worker.history is None else worker.history,
            worker.reuse_score,
            matched=matched,
            streaming=request.streaming,
            certain=certain,
            now=now,
        )

    @contextmanager
    def dispatching(self, decision: Decision, request: RouteRequest, clock: Callable[[], float]) -> Iterator[Ticket]:
        """`dispatch`, and release the ticket when the block is left, however it is left: as reused if the worker served
        the request or a first byte came."""
        ticket = self.dispatch(decision, request, clock())
        try:
            yield ticket
        finally:
            ticket.release(clock(), reused=ticket.served or ticket.answered)

    def waits(self, request: RouteRequest, now: float) -> dict[str, float]:
        """Seconds for which the request would wait on each worker that can take it, by URL, for prefills and memory:
        not for the step in progress, which is always there. O(workers). Raises as `choose` does."""
        shape = shape_of(request, self.config.block_size, self._learnt.lengths)
        workers = self._candidates(request, ()).workers
        return {worker.url: worker.work.ahead(now) + worker.work.expect(shape, 0, now).memory for worker in workers}

    def on_room(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever a worker may have room that had none: a request was answered or is over, a report
        came, a worker became ready. It is called while that happens and must not call the fleet."""
        self._changes.on_room = notify

    def _candidates(self, request: RouteRequest, exclude: Collection[str]) -> Candidates:
        if request.stored is not None:
            return Candidates(holders(self._workers.values(), request.stored, exclude, self.config.retry_after))
        return self.directory.candidates(request, exclude, self.config.retry_after)

    # --- status ----------------------------------------------------------------------------------

    def workers(self, now: float) -> list[WorkerStatus]:
        """Every worker, whether a candidate or not, in the order in which they joined."""
        ready = {worker.url for worker in candidates(self._workers.values())}
        index = self._index
        return [worker.status(index, now, ready=worker.url in ready) for worker in self._workers.values()]

    def held_blocks(self, url: str, tier: Tier = Tier.GPU) -> dict[BlockKey, int]:
        """How many blocks of each key the worker holds in this tier, as far as its feed has said. Raises
        `UnknownWorker`."""
        return self._index.held(self._find(url).view.slot, tier)

    def adopt_tokenizer(self, fingerprint: str, model: str = OWN_TOKENIZER) -> None:
        """The router's tokenizer for a model (its own, or one of `FleetConfig.fingerprints`) is loaded: workers with
        the same one are matched from their next snapshot on."""
        if model == OWN_TOKENIZER:
            self.config = replace(self.config, fingerprint=fingerprint)
        else:
            self.config = replace(self.config, fingerprints={**self.config.fingerprints, model: fingerprint})
        for worker in self._workers.values():
            refusal = worker.view.refusal
            if refusal is not None and refusal.reason is not RejectReason.DUPLICATE_WORKER:
                worker.view.reconsider()

    @property
    def index_bytes(self) -> int:
        """Memory that the index takes, estimated."""
        return self._index.memory()

    @property
    def index_blocks(self) -> int:
        """Distinct blocks that any worker holds."""
        return len(self._index)

    @property
    def assumed_blocks(self) -> int:
        """Distinct blocks that are assumed present because a request was sent, and not yet confirmed or given up."""
        return self._index.assumed_blocks()
