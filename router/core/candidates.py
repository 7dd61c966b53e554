"""Which workers a request may be sent to, by their states. `docs/routing.md` says the same in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.core.worker import Worker
from router.core.worker_state import State


def candidates(workers: Iterable[Worker], exclude: Collection[str] = ()) -> list[Worker]:
    """The workers that a request not yet sent to any of `exclude` (URLs) may go to, in the order given.

    The best there are: those that serve; else those that drain; else, when none serves at all, those that are paused;
    else those that are ejected. A request that failed at every worker that serves is not sent to one that asked for a
    pause or is ejected: they are left out for a reason.
    """
    serving: list[Worker] = []
    draining: list[Worker] = []
    paused: list[Worker] = []
    ejected: list[Worker] = []
    for worker in workers:
        match worker.state:
            case State.SERVING:
                serving.append(worker)
            case State.HALF_OPEN:
                (ejected if worker.work.ledger.in_flight else serving).append(worker)
            case State.DRAINING:
                draining.append(worker)
            case State.PAUSED:
                paused.append(worker)
            case State.EJECTED:
                ejected.append(worker)
    last_resort = () if serving else (paused, ejected)
    for tier in (serving, draining, *last_resort):
        left = [worker for worker in tier if worker.url not in exclude] if exclude else tier
        if left:
            return left
    return []
