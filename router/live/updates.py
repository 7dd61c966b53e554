"""What a reader of `GET /live/events` has to change in its copy of the live document.

The first event of a stream is `live`, with a whole document. Each further one is `update`, or `live` again for a reader
that was too slow for an update. `difference` and `applied` are inverse: tests hold that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from typing import Any

from pydantic import TypeAdapter, ValidationError

from router.live.document import (
    DecisionLive,
    History,
    Live,
    QueueLive,
    RouterLive,
    Totals,
    WorkerLive,
    reported_error,
)

DECISIONS = 100
"""Decisions that a document holds at most."""


@dataclass(frozen=True, slots=True)
class Update:
    """Everything that changed since the document or update before it; `None`: nothing."""

    at: float
    """Unix seconds of the document that the update leads to."""
    routers: tuple[RouterLive, ...] | None = None
    """All of them."""
    workers: tuple[Mapping[str, Any], ...] = ()
    """Of each worker that changed, its `url` and the fields that changed; of a new one, all fields."""
    gone: tuple[str, ...] = ()
    """URLs of workers that are there no longer."""
    totals: Totals | None = None
    history: History | None = None
    """Steps from `at[0]` on: they replace those that the reader has from then on."""
    history_steps: int = 0
    """Steps that the history has now: the oldest ones beyond that are dropped."""
    decisions: tuple[DecisionLive, ...] = ()
    """New ones, newest first; those beyond the latest `DECISIONS` are dropped."""
    queues: tuple[QueueLive, ...] | None = None
    """All of them."""


_SERIES = tuple(each.name for each in fields(History) if each.name != "step_seconds")
_WORKER = tuple(each.name for each in fields(WorkerLive))
_values = attrgetter(*_WORKER)
_UPDATE, _WORKER_LIVE = TypeAdapter(Update), TypeAdapter(WorkerLive)


def difference(old: Live, new: Live) -> Update:
    """What leads from `old` to `new`. O(size of the two)."""
    known, now = {worker.url: worker for worker in old.workers}, {worker.url for worker in new.workers}
    shown = {decision.id for decision in old.decisions}
    return Update(
        at=new.at,
        routers=new.routers if new.routers != old.routers else None,
        workers=tuple(filter(None, (_changed(known.get(worker.url), worker) for worker in new.workers))),
        gone=tuple(url for url in known if url not in now),
        totals=new.totals if new.totals != old.totals else None,
        history=_new_steps(old.history, new.history),
        history_steps=len(new.history.at),
        decisions=tuple(decision for decision in new.decisions if decision.id not in shown),
        queues=new.queues if new.queues != old.queues else None,
    )


def _changed(old: WorkerLive | None, new: WorkerLive) -> Mapping[str, Any] | None:
    """The worker's URL and what changed; None: nothing did."""
    if old is None:
        return asdict(new)
    before, now = _values(old), _values(new)
    if before == now:
        return None
    changed = {name: value for name, value, was in zip(_WORKER, now, before, strict=True) if value != was}
    return {"url": new.url, **changed}


def _new_steps(old: History, new: History) -> History | None:
    if old == new:
        return None
    known = {at: step for at, *step in _rows(old)}
    same = 0
    if old.step_seconds == new.step_seconds:
        for at, *step in _rows(new):
            if known.get(at) != step:
                break
            same += 1
    if new.at and same == len(new.at) and old.at[-1] > new.at[-1]:
        same = 0  # the last steps are gone, which only steps that replace them can say
    series: dict[str, Any] = {name: getattr(new, name)[same:] for name in _SERIES}
    return replace(new, **series)


def _rows(history: History) -> Sequence[tuple[Any, ...]]:
    return list(zip(*(getattr(history, name) for name in _SERIES), strict=True))


def applied(document: Live, update: Update) -> Live:
    """The document after this update. Raises `DocumentError` if the update does not belong to it."""
    workers = {worker.url: worker for worker in document.workers}
    for url in update.gone:
        workers.pop(url, None)
    for changed in update.workers:
        known = workers.get(changed.get("url", ""))
        try:
            whole = _WORKER_LIVE.validate_python({**(asdict(known) if known is not None else {}), **changed})
            workers[whole.url] = whole
        except ValidationError as error:
            raise reported_error(error, "update of a worker") from None
    decisions = sorted((*update.decisions, *document.decisions), key=lambda each: (-each.at, each.id))
    return Live(
        at=update.at,
        routers=update.routers if update.routers is not None else document.routers,
        workers=tuple(workers[url] for url in sorted(workers)),
        totals=update.totals if update.totals is not None else document.totals,
        history=_joined(document.history, update),
        decisions=tuple(decisions[:DECISIONS]),
        queues=update.queues if update.queues is not None else document.queues,
    )


def _joined(history: History, update: Update) -> History:
    new, keep = update.history, update.history_steps
    if new is None:
        return history
    kept = sum(at < new.at[0] for at in history.at) if new.at else len(history.at)
    joined = {name: (getattr(history, name)[:kept] + getattr(new, name)) for name in _SERIES}
    return replace(new, **{name: values[len(values) - keep :] for name, values in joined.items()})


def decode_update(body: bytes) -> Update:
    """An update from its JSON. Raises `DocumentError`."""
    try:
        return _UPDATE.validate_json(body)
    except ValidationError as error:
        raise reported_error(error, "update of a live document") from None
