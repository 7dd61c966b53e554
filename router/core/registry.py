"""Who the workers are: joining, leaving, identity and life; and the feed messages they are changed by."""

from __future__ import annotations

from collections.abc import Iterator

from kvcache.feed import Batch, Eviction, Heartbeat, Load, Snapshot, WorkerInfo
from router.core.config import FleetConfig
from router.core.errors import DuplicateWorker, FeedRejected, RejectReason, UnknownWorker
from router.core.health import Health
from router.core.index import PrefixIndex
from router.core.latency_correction import FleetPace
from router.core.reuse import ReuseScore
from router.core.view import View
from router.core.work import Residence, Work
from router.core.worker import Worker
from router.core.worker_state import State

MAX_URL = 2048


class Registry:
    """Workers by URL, and which of them owns each worker id.

    Invariant: `_owners[id] is m` exactly for the workers whose view's info states that id and is not refused as a
    duplicate. A worker id has one owner: the latest life that is reachable.
    """

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self.index = PrefixIndex()
        self._pace = FleetPace()
        self.residence = Residence(config.expected_output_tokens, config.latency.decode)
        self._workers: dict[str, Worker] = {}
        self._owners: dict[str, Worker] = {}
        self._expired_at: float | None = None
        self.health = Health(config, self._workers.values())

    # --- who there is -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def find(self, url: str) -> Worker:
        """The worker at this URL. Raises `UnknownWorker`."""
        worker = self._workers.get(url)
        if worker is None:
            raise UnknownWorker(
                f"no worker is registered at {url!r:.200}: add it to discovery or send a heartbeat first"
            )
        return worker

    def get(self, url: str) -> Worker | None:
        """The worker at this URL, if there is one."""
        return self._workers.get(url)

    def add(self, url: str, feed_vouches: bool) -> None:
        """Discovery names a worker, one that is known by its heartbeats perhaps."""
        worker = self._workers.get(url)
        if worker is None:
            worker = self._join(url)
        worker.discovered = True
        worker.feed_vouches = feed_vouches

    def remove(self, url: str) -> None:
        """Forgets a worker altogether."""
        worker = self._workers.pop(url, None)
        if worker is not None:
            self._disown(worker)
            worker.view.close()
            self.health.fleet_shrank()

    def _join(self, url: str) -> Worker:
        config = self._config
        work = Work(config, self._pace, self.residence)
        worker = Worker(url, View(self.index, config.view_timeout), work, ReuseScore(config.reuse_half_life))
        self._workers[url] = worker
        return worker

    # --- life -------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[str]:
        """Workers that were silent for too long; see `Fleet.expire`."""
        timeout = self._config.liveness_timeout
        late = self._expired_at is not None and now - self._expired_at > timeout / 2
        self._expired_at = now
        left, forgotten = [], []
        for worker in self._workers.values():
            worker.work.expire_report(now)
            silent = now - worker.heard_at
            if not worker.reachable:
                if not worker.discovered and silent > self._config.forget_after:
                    forgotten.append(worker.url)
            elif late and not worker.doubted:
                worker.doubted = True
                worker.heard_at = now
            elif silent > timeout:
                worker.silence(f"it has been silent for more than {timeout:g} s")
                left.append(worker.url)
        if left:
            self.health.fleet_shrank()
        for url in forgotten:
            self.remove(url)
        return left

    def silence(self, url: str, now: float) -> float:
        """See `Fleet.silence`."""
        worker = self._workers.get(url)
        return now - worker.heard_at if worker is not None and worker.state is State.UNREACHABLE else 0.0

    # --- identity ---------------------------------------------------------------------------------------

    def _conflict(self, worker: Worker, info: WorkerInfo) -> DuplicateWorker | None:
        """Why `worker` cannot own the worker id: another one's claim is as good."""
        owner = self._owners.get(info.worker_id)
        if owner is None or owner is worker or not owner.reachable:
            return None
        epoch = owner.view.epoch
        if epoch is None or epoch < info.epoch or (epoch == info.epoch and not owner.discovered):
            return None  # in the same life it is one process, known by its heartbeats before discovery named it
        return DuplicateWorker(info.worker_id, owner.url)

    def _own(self, worker: Worker, info: WorkerInfo) -> None:
        """Makes `worker` the owner of the worker id, in place of whoever had it."""
        owner = self._owners.pop(info.worker_id, None)
        if owner is not None and owner is not worker:
            if owner.discovered:
                owner.view.refuse(DuplicateWorker(info.worker_id, worker.url))
            else:
                self.remove(owner.url)
        if worker.worker_id != info.worker_id:
            self._disown(worker)
        self._owners[info.worker_id] = worker

    def _disown(self, worker: Worker) -> None:
        """Gives up the worker's worker id; whoever was refused for claiming it may try again."""
        if self._owners.get(worker.worker_id) is not worker:
            return
        del self._owners[worker.worker_id]
        for other in self._workers.values():
            refused = other.view.refused
            if other is not worker and refused is not None and refused.reason is RejectReason.DUPLICATE_WORKER:
                other.view.refused = None  # not synced, so its next batch asks for a snapshot

    def _owner(self, worker_id: str) -> Worker:
        worker = self._owners.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"no worker calls itself {worker_id!r:.200}: send a heartbeat first")
        return worker

    def reconsider(self, config: FleetConfig) -> None:
        """The router's own side of what must agree has changed: whoever was refused for it may try again."""
        self._config = config
        for worker in self._workers.values():
            if worker.view.refused is not None and worker.view.refused.reason is not RejectReason.DUPLICATE_WORKER:
                worker.view.refused = None  # not synced, so its next batch asks for a snapshot

    # --- the feed ---------------------------------------------------------------------------------------

    def apply_snapshot(self, url: str, snapshot: Snapshot, now: float) -> None:
        """See `Fleet.apply_snapshot`."""
        worker = self.find(url)
        view, info = worker.view, snapshot.info
        if worker.reachable:
            view.check_epoch(info.epoch)  # after a lost contact any life may be the current one: clocks can step back
        worker.fed(now)
        conflict = worker.unmask(info) or self._conflict(worker, info)
        if conflict is None:
            self._own(worker, info)
        else:
            self._disown(worker)
        self._meet(worker, info, snapshot.load, now)
        refusal = conflict or self._config.mismatch(info)
        if refusal is not None:
            view.refuse(refusal)
            raise refusal
        view.install(snapshot, now)
        view.pulled_at = now

    def apply_batch(self, url: str, batch: Batch, now: float) -> None:
        """See `Fleet.apply_batch`."""
        worker = self.find(url)
        worker.view.check_epoch(batch.epoch)
        worker.fed(now)
        worker.view.apply(batch, now)
        worker.view.pulled_at = now
        worker.work.report(batch.load, now)

    def apply_heartbeat(self, heartbeat: Heartbeat, now: float) -> bool:
        """See `Fleet.apply_heartbeat`."""
        info, url = heartbeat.info, heartbeat.url.rstrip("/")
        refusal = self._config.mismatch(info)
        if refusal is not None and refusal.reason is not RejectReason.NO_TOKENIZER:
            raise refusal
        if not url.startswith(("http://", "https://")) or len(url) > MAX_URL:
            raise FeedRejected(RejectReason.MALFORMED, f"url must look like http://host:port, not {url!r:.200}")
        owner = self._owners.get(info.worker_id)
        worker = self._workers.get(url)
        if owner is not None:
            owner.view.check_epoch(info.epoch)
            if owner.view.epoch == info.epoch:
                worker = owner  # one process; discovery may know it by another name of the same address
        if worker is not None:
            worker.view.check_epoch(info.epoch)
        if worker is None:
            worker = self._join(url)
        self._own(worker, info)
        worker.heard(now)
        self._meet(worker, info, heartbeat.load, now)
        view = worker.view
        if refusal is not None:
            view.refuse(refusal)
            return False
        if view.synced and view.seq == heartbeat.seq:
            view.confirmed_at = now
        return not view.synced and not self._streams(worker, now)

    def apply_sync(self, snapshot: Snapshot, now: float) -> None:
        """See `Fleet.apply_sync`."""
        refusal = self._config.mismatch(snapshot.info)
        if refusal is not None and refusal.reason is not RejectReason.NO_TOKENIZER:
            raise refusal
        worker = self._owner(snapshot.info.worker_id)
        worker.view.check_epoch(snapshot.info.epoch)
        worker.heard(now)
        self._meet(worker, snapshot.info, snapshot.load, now)
        if refusal is not None:
            worker.view.refuse(refusal)
        elif not self._streams(worker, now):
            worker.view.install(snapshot, now)

    def apply_eviction(self, eviction: Eviction, now: float) -> None:
        """See `Fleet.apply_eviction`."""
        worker = self._owner(eviction.worker_id)
        worker.view.check_epoch(eviction.epoch)
        if not self._streams(worker, now):
            worker.view.evict(eviction)
        worker.heard(now)

    def _meet(self, worker: Worker, info: WorkerInfo, load: Load, now: float) -> None:
        if worker.view.epoch != info.epoch:
            worker.work.forget_report()
            worker.reuse_score.clear()
            worker.renewed()
        worker.view.meet(info)
        worker.work.report(load, now)

    def _streams(self, worker: Worker, now: float) -> bool:
        """Whether the worker's own stream is live, which is fresher than any push."""
        pulled = worker.view.pulled_at
        return pulled is not None and worker.view.synced and now - pulled <= self._config.liveness_timeout
