"""Updates: a reader that applies each of them to its copy has the document that the router has.

Not covered: how they reach readers (`test_broadcast`).
"""

from __future__ import annotations

import random
from dataclasses import asdict, fields, replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.live.document import DocumentError, History, Live, QueueLive
from router.live.updates import DECISIONS, Update, applied, decode_update, difference
from tests.router.live import sample


def later(document: Live, seed: int) -> Live:
    """The document some time later: anything may have happened."""
    rng = random.Random(seed)
    other = sample.live(len(document.workers), len(document.routers), len(document.history.at), seed=seed)
    workers = {worker.url: worker for worker in document.workers if rng.random() < 0.9}
    for worker in other.workers:
        if rng.random() < 0.5:
            workers[worker.url] = worker
    fresh = tuple(
        replace(decision, id=f"5f3c:{2_000 + seed * 100 + index}", at=document.at + rng.random())
        for index, decision in enumerate(other.decisions[: rng.randrange(20)])
    )
    decisions = sorted((*document.decisions, *fresh), key=lambda each: (-each.at, each.id))[:DECISIONS]
    return Live(
        at=document.at + 1.0,
        routers=other.routers[: rng.randrange(1, 3)] if rng.random() < 0.5 else document.routers,
        workers=tuple(workers[url] for url in sorted(workers)),
        totals=replace(document.totals, requests=document.totals.requests + rng.randrange(2)),
        history=later_history(document.history, rng),
        decisions=tuple(decisions),
        queues=rng.choice(((), document.queues, other.queues, tuple(map(_longer, other.queues)))),
    )


def _longer(queue: QueueLive) -> QueueLive:
    return replace(queue, waiting=queue.waiting + 1, oldest_seconds=(queue.oldest_seconds or 0.0) + 1.0)


def later_history(history: History, rng: random.Random) -> History:
    """Steps are added, the last ones may have been completed, and the oldest may be gone."""
    names = [each.name for each in fields(history) if each.name not in ("step_seconds", "at")]
    start, more, redone = rng.randrange(4), rng.randrange(3), rng.randrange(3)
    if rng.random() < 0.2:  # the router that knew the last steps is gone
        history = replace(history, **{name: getattr(history, name)[:-2] for name in ("at", *names)})
    at = list(history.at)
    at += [(at[-1] if at else int(sample.AT)) + 5 * (step + 1) for step in range(more)]
    series = {}
    for name in names:
        values = list(getattr(history, name))
        values[len(values) - redone :] = [rng.random() for _ in values[len(values) - redone :]]
        series[name] = tuple([*values, *(rng.random() for _ in range(more))][start:])
    return replace(history, at=tuple(at[start:]), **series)


@given(st.integers(0, 20), st.integers(0, 12), st.lists(st.integers(0, 1_000), min_size=1, max_size=5, unique=True))
@settings(max_examples=40, deadline=None)
def test_the_copy_follows_the_document(workers: int, steps: int, seeds: list[int]) -> None:
    document = copy = sample.live(workers, steps=steps)
    for seed in seeds:
        new = later(document, seed)
        update = decode_update(orjson.dumps(difference(document, new)))
        copy = applied(copy, update)
        document = new
        assert copy == document


def test_only_what_changed_is_sent() -> None:
    document = sample.live(60)
    worker = document.workers[7]
    workers = (*document.workers[:7], replace(worker, running=99), *document.workers[8:])
    update = difference(document, replace(document, at=document.at + 1.0, workers=workers))
    assert update == Update(
        at=document.at + 1.0, workers=({"url": worker.url, "running": 99},), history_steps=len(document.history.at)
    )


def test_a_decision_is_sent_once() -> None:
    document = sample.live(decisions=5)
    newest = replace(document.decisions[0], id="5f3c:1001", at=document.at + 0.5)
    update = difference(document, replace(document, decisions=(newest, *document.decisions)))
    assert update.decisions == (newest,)


def test_an_update_of_a_worker_that_the_copy_does_not_have_is_refused() -> None:
    with pytest.raises(DocumentError, match="no update of a worker"):
        applied(sample.live(2), Update(sample.AT, workers=({"url": "http://10.9.9.9:8000", "running": 3},)))


def test_what_is_no_update_is_named() -> None:
    fields_of_update = asdict(Update(sample.AT)) | {"gone": "all"}
    with pytest.raises(DocumentError, match="no update of a live document: gone"):
        decode_update(orjson.dumps(fields_of_update))
