"""Which worker a worker id belongs to, when several URLs state the same id."""

from __future__ import annotations

from collections.abc import ValuesView

from kvcache.feed import WorkerInfo
from router.core.errors import DuplicateWorker, RejectReason, UnknownWorker
from router.core.worker import Worker


class Owners:
    """The owner of each worker id: the reachable worker whose incarnation is the latest.

    Invariant: `get(id) is w` exactly for the workers whose view's info states that id and is not refused as a
    duplicate.
    """

    def __init__(self, workers: ValuesView[Worker]) -> None:
        """`workers`: a live view of all workers of the fleet."""
        self._workers = workers
        self._owners: dict[str, Worker] = {}

    def get(self, worker_id: str) -> Worker | None:
        """The owner of this id, if it has one."""
        return self._owners.get(worker_id)

    def find(self, worker_id: str) -> Worker:
        """The owner of this id. Raises `UnknownWorker`."""
        worker = self._owners.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"no worker calls itself {worker_id!r:.200}: send a heartbeat first")
        return worker

    def conflict(self, worker: Worker, info: WorkerInfo) -> DuplicateWorker | None:
        """Why `worker` cannot own the worker id that it states: another worker has it, with the same epoch or a later
        one."""
        owner = self._owners.get(info.worker_id)
        if owner is None or owner is worker or not owner.reachable:
            return None
        epoch = owner.view.epoch
        if epoch is None or epoch < info.epoch or (epoch == info.epoch and not owner.discovered):
            return None  # with the same epoch it is one process, known by its heartbeats before discovery named it
        return DuplicateWorker(info.worker_id, owner.url)

    def own(self, worker: Worker, info: WorkerInfo) -> Worker | None:
        """Make `worker` the owner of the worker id. Returns the owner that it replaces: one that discovery names is
        refused as a duplicate, another one has to be removed from the fleet."""
        owner = self._owners.pop(info.worker_id, None)
        if owner is worker:
            owner = None
        if owner is not None and owner.discovered:
            owner.view.refuse(DuplicateWorker(info.worker_id, worker.url))
        if worker.worker_id != info.worker_id:
            self.disown(worker)
        self._owners[info.worker_id] = worker
        return owner

    def disown(self, worker: Worker) -> None:
        """Give up the worker's id; workers that were refused because they state the same id may try again."""
        if self._owners.get(worker.worker_id) is not worker:
            return
        del self._owners[worker.worker_id]
        for other in self._workers:
            refusal = other.view.refusal
            if other is not worker and refusal is not None and refusal.reason is RejectReason.DUPLICATE_WORKER:
                other.view.reconsider()
