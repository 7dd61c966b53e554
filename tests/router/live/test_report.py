"""Reports of several routers: merging is associative, and every figure equals a sum that is made without it.

Not covered: how reports reach another router (`test_peers`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.view import Trust
from router.core.worker_state import WorkerPhase
from router.live.document import DecisionLive, DocumentError, QueueLive, RouterLive, RouterPhase
from router.live.history import Step
from router.live.report import (
    Counts,
    LoadReported,
    Report,
    WorkerReport,
    by,
    decode_report,
    encode_report,
    live,
    merged,
)
from router.live.updates import DECISIONS

BOUNDS = ((0.01, 0.1), (0.01, 0.1))


def worker(url: str = "http://w", **changes: Any) -> WorkerReport:
    fields: dict[str, Any] = {
        "url": url,
        "worker_id": url,
        "pod": "",
        "state": WorkerPhase.SERVING,
        "ready": True,
        "problems": (),
        "routers": 1,
        "load": None,
        "held": None,
        "view_age": None,
        "trust": Trust.EXACT,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "reuse_score": 0.0,
        "in_flight": 0,
        "requests": 0,
    }
    return WorkerReport(**(fields | changes))


def report(name: str, *workers: WorkerReport, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "bounds": BOUNDS,
        "instance": name,
        "routers": (RouterLive(name, "", RouterPhase.SERVING),),
        "uptime_seconds": 1.0,
        "workers": workers,
        "counts": Counts(),
        "steps": (),
        "decisions": (),
    }
    return Report(**(fields | changes))


def decision(number: int, name: str, at: float) -> DecisionLive:
    return DecisionLive(f"{name}:{number}", at, name, "w", "no_match", 0, 1, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0)


def any_worker(url: str, name: str, rng: random.Random) -> WorkerReport:
    cached = rng.randrange(1000)
    problem = rng.choice(["", "", "it is silent", "it turned a request away"])
    return worker(
        url,
        worker_id=rng.choice([url, "named"]),
        state=rng.choice([phase for phase in WorkerPhase if phase is not WorkerPhase.GONE]),
        ready=rng.random() < 0.7,
        problems=((name, problem),) if problem else (),
        load=rng.choice([None, LoadReported(float(rng.randrange(9)), rng.randrange(9), rng.randrange(9), 100)]),
        held=rng.choice([None, (float(rng.randrange(9)), rng.randrange(100))]),
        view_age=rng.choice([None, float(rng.randrange(9))]),
        trust=rng.choice(list(Trust)),
        prompt_tokens=cached + rng.randrange(1000),
        cached_tokens=cached,
        reuse_score=float(rng.randrange(1000)),
        in_flight=rng.randrange(1000),
        requests=rng.randrange(1000),
    )


def any_report(name: str, seed: int) -> Report:
    rng = random.Random(seed)

    def count() -> int:
        return rng.choice((0, rng.randrange(1000)))

    urls = sorted(rng.sample(["http://a", "http://b", "http://c"], rng.randrange(4)))
    numbers = sorted(rng.sample(range(1, 5), rng.randrange(5)))
    buckets = (1, 2, 0)
    return report(
        name,
        *(any_worker(url, name, rng) for url in urls),
        uptime_seconds=float(rng.randrange(100)),
        counts=Counts(count(), count(), count(), count(), float(count())),
        steps=tuple(
            Step(number, 5.0, count(), count(), count(), float(count()), buckets, buckets, count(), 2.0)
            for number in numbers
        ),
        decisions=tuple(decision(number, name, float(rng.randrange(9))) for number in range(rng.randrange(4))),
        queues=tuple(any_queue(each, rng) for each in QUEUES if rng.random() < 0.7),
    )


QUEUES = (("high", 1), ("standard", 0), ("sheddable", -1))


def any_queue(named: tuple[str, int], rng: random.Random) -> QueueLive:
    waiting = rng.choice((0, rng.randrange(1, 100)))
    oldest = float(rng.randrange(90)) if waiting else None
    return QueueLive(*named, waiting, rng.randrange(waiting + 1), oldest, rng.randrange(100))


@st.composite
def several(draw: Callable[..., Any]) -> list[Report]:
    """Reports of three routers."""
    return [any_report(name, draw(st.integers(0, 1_000_000))) for name in ("x", "y", "z")]


@given(several())
@settings(max_examples=60, deadline=None)
def test_it_does_not_matter_in_which_order_reports_are_merged(of: list[Report]) -> None:
    x, y, z = of
    assert merged(merged(x, y), z) == merged(x, merged(y, z)) == merged(x, y, z)
    swapped = merged(z, y, x)
    assert replace(swapped, instance="x", routers=()) == replace(merged(x, y, z), routers=())


@given(several())
@settings(max_examples=60, deadline=None)
def test_the_document_shows_sums_of_what_the_routers_counted(of: list[Report]) -> None:
    document = live(merged(*of), at=100.0)
    assert [router.name for router in document.routers] == ["x", "y", "z"]
    totals = document.totals
    assert totals.requests == sum(each.counts.requests for each in of)
    prompt = sum(each.counts.prompt_tokens for each in of)
    cached = sum(each.counts.cached_tokens for each in of)
    assert totals.hit_rate == (round(cached / prompt, 4) if prompt else None)
    for shown in document.workers:
        seen = [each for one in of for each in one.workers if each.url == shown.url]
        assert shown.in_flight == sum(each.in_flight for each in seen)
        assert shown.requests == sum(each.requests for each in seen)
        prompt = sum(each.prompt_tokens for each in seen)
        assert shown.hit_rate == (round(sum(each.cached_tokens for each in seen) / prompt, 4) if prompt else None)
        loads = [each.load for each in seen if each.load is not None]
        youngest = [load for load in loads if load.age == min(each.age for each in loads)]
        assert (shown.running in {load.running for load in youngest}) if loads else shown.running is None
        ages = [each.view_age for each in seen if each.view_age is not None]
        assert shown.view_age_seconds == max(ages, default=None)
        assert shown.ready == all(each.ready for each in seen)
        assert (shown.problem is None) == (not any(each.problems for each in seen))
    for number, end in enumerate(document.history.at):
        steps = [step for one in of for step in one.steps if step.number * 5 == end]
        rate = sum(step.requests for step in steps) / 5.0 if steps else None
        assert document.history.requests_per_second[number] == rate
        saved = sum(step.prefill_seconds_saved for step in steps) if steps else None
        assert document.history.prefill_seconds_saved[number] == saved
    if document.history.at:
        saved = sum(step.prefill_seconds_saved for one in of for step in one.steps)
        assert totals.gpus_saved == round(saved / (5 * len(document.history.at)), 4)
    newest = sorted((each for one in of for each in one.decisions), key=lambda each: (-each.at, each.id))
    assert list(document.decisions) == newest[:DECISIONS]


@given(several())
@settings(max_examples=20, deadline=None)
def test_a_report_is_the_same_after_it_was_sent(of: list[Report]) -> None:
    together = merged(*of)
    assert decode_report(encode_report(together)) == together


@given(several())
@settings(max_examples=40, deadline=None)
def test_what_waits_is_added_class_by_class_the_most_urgent_first(of: list[Report]) -> None:
    shown = live(merged(*of), 100.0).queues
    assert [(each.name, each.priority) for each in shown] == [
        each for each in QUEUES if any(each[0] == queue.name for one in of for queue in one.queues)
    ]
    for queue in shown:
        parts = [each for one in of for each in one.queues if each.name == queue.name]
        assert queue.waiting == sum(each.waiting for each in parts)
        assert (queue.held, queue.shed) == (sum(each.held for each in parts), sum(each.shed for each in parts))
        ages = [each.oldest_seconds for each in parts if each.oldest_seconds is not None]
        assert queue.oldest_seconds == max(ages, default=None)
        assert (queue.oldest_seconds is None) == (queue.waiting == 0)


def test_a_problem_that_every_router_sees_is_told_once() -> None:
    silent = [report(name, worker(problems=((name, "it is silent"),))) for name in ("x", "y")]
    assert live(merged(*silent), 1.0).workers[0].problem == "it is silent"


def test_a_problem_that_one_router_sees_names_the_router() -> None:
    document = live(merged(report("x", worker()), report("y", worker(problems=(("y", "it is silent"),)))), 1.0)
    assert document.workers[0].problem == "y: it is silent"


def test_a_clock_that_is_ahead_hides_nothing_of_the_others() -> None:
    steps = tuple(Step(number, 5.0, 1, 0, 0, 0.0, (), (), 0, 0.0) for number in (19, 20, 21, 22, 9999))
    told = by(100.0, report("x", steps=steps, decisions=(decision(2, "x", 1e9), decision(1, "x", 99.0))))
    assert [step.number for step in told.steps] == [19, 20, 21], "what has begun by now"
    assert [each.at for each in told.decisions] == [100.0, 99.0]


def test_routers_with_other_buckets_cannot_be_added() -> None:
    with pytest.raises(DocumentError, match="other buckets"):
        merged(report("x"), report("y", bounds=((1.0,), (1.0,))))


def test_what_is_no_report_is_named() -> None:
    with pytest.raises(DocumentError, match=r"no report of a router: .*instance"):
        decode_report(b'{"bounds": [[], []]}')
