"""What the times of answers, streamed or not, teach about the speed of engines, through the fleet.

Not covered: the statistics (test_latency_correction.py), and engines under a real load (tests/bench/test_uneven.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcache.feed import Batch, Load
from router.core.fleet import Fleet
from router.core.latency_samples import Usage
from tests.router.core.support import BLOCK, LATENCY, MakeFleet, ask, idle, info, send, snapshot, tokens, url_of

SLOW = 4.0


@pytest.fixture
def clock() -> Iterator[float]:
    """Times 10 s apart, each after whatever came before is over."""
    return iter([10.0 * turn for turn in range(1, 10_000)])


def confirm(fleet: Fleet, now: float) -> None:
    for number, _ in enumerate(fleet.workers(now)):
        fleet.apply_batch(url_of(number), Batch(1, 0, (), idle()), now)


def answer(
    fleet: Fleet,
    now: float,
    *,
    blocks: int = 60,
    output: int = 40,
    streaming: bool = False,
    prefill: float = 1.0,
    decode: float = 1.0,
    details: bool = True,
) -> None:
    """One request, alone on its worker: an engine `prefill` times as slow at prefill, `decode` times at decoding."""
    confirm(fleet, now)
    request = ask(tokens(blocks, start=int(now) * 1000), streaming=streaming)
    _, ticket = send(fleet, request, now)
    first = now + prefill * LATENCY.prefill(blocks + 1)
    end = first + decode * (output - 1) * LATENCY.decode
    if streaming:
        ticket.first_token(first)
    ticket.finished(end, Usage(blocks * BLOCK + 1, output, 0 if details else None))
    ticket.served = True
    ticket.release(end)


@pytest.mark.parametrize("details", [True, False], ids=["with cached tokens", "without"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_answers_of_either_kind_teach_prefill_and_decode(
    make_fleet: MakeFleet, clock: Iterator[float], streaming: bool, details: bool
) -> None:
    fleet = make_fleet(1)
    for turn in range(400):
        long_prompt = turn % 2 == 0
        answer(
            fleet,
            next(clock),
            blocks=200 if long_prompt else 10,
            output=10 if long_prompt else 100,
            streaming=streaming,
            prefill=SLOW,
            decode=2.0,
            details=details,
        )
    (worker,) = fleet.workers(next(clock))
    assert worker.latency_factor == pytest.approx(SLOW, rel=0.1)
    assert worker.decode_factor == pytest.approx(2.0, rel=0.1)


def test_what_the_engine_had_cached_is_not_taken_for_speed(make_fleet: MakeFleet, clock: Iterator[float]) -> None:
    """The view knows nothing of a hit; the answer states it."""
    fleet = make_fleet(1)
    for _ in range(50):
        now = next(clock)
        confirm(fleet, now)
        _, ticket = send(fleet, ask(tokens(60, start=int(now) * 1000), streaming=False), now)
        end = now + LATENCY.prefill(11) + 39 * LATENCY.decode
        ticket.finished(end, Usage(60 * BLOCK + 1, 40, 50 * BLOCK))
        ticket.release(end)
    (worker,) = fleet.workers(next(clock))
    assert worker.latency_factor == pytest.approx(1.0, rel=0.05)
    assert worker.decode_factor == pytest.approx(1.0, rel=0.05)


def test_a_busy_engine_is_not_taken_for_a_slow_one(make_fleet: MakeFleet, clock: Iterator[float]) -> None:
    """Four whole answers at a time: each takes as long as all prefills and its decoding."""
    fleet = make_fleet(1)
    for _ in range(50):
        now = next(clock)
        confirm(fleet, now)
        prompts = [tokens(60, start=int(now) * 1000 + 300 * n) for n in range(4)]
        tickets = [send(fleet, ask(prompt, streaming=False), now)[1] for prompt in prompts]
        end = now + 4 * LATENCY.prefill(61) + 36 * LATENCY.decode
        for ticket in tickets:
            ticket.finished(end, Usage(60 * BLOCK + 1, 40, 0))
            ticket.release(end)
    (worker,) = fleet.workers(next(clock))
    assert worker.latency_factor == pytest.approx(1.0, rel=0.2)
    assert worker.decode_factor == pytest.approx(1.0, rel=0.2)


def test_nothing_is_learnt_of_a_request_that_is_over_or_states_no_length(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    for _ in range(20):
        _, ticket = send(fleet, ask(tokens(60), streaming=False), 0.0)
        ticket.finished(9.0, Usage(60 * BLOCK + 1))
        ticket.release(9.0)
        ticket.finished(9.0, Usage(60 * BLOCK + 1, 40, 0))
    (worker,) = fleet.workers(9.0)
    assert (worker.latency_factor, worker.decode_factor) == (1.0, 1.0)


def test_a_whole_answer_goes_where_it_is_over_soonest(make_fleet: MakeFleet, clock: Iterator[float]) -> None:
    """A stream goes to the slow decoder, which holds its prompt: it begins soonest there. A whole answer goes to the
    other, where it is over soonest though its prompt is computed again."""
    fleet = make_fleet(2)
    for _ in range(60):
        now = next(clock)
        confirm(fleet, now)
        for number, decode in ((0, SLOW), (1, 1.0)):
            request = ask(tokens(60, start=int(now) * 1000 + 300 * number))
            decision = fleet.choose(request, now, exclude=[url_of(1 - number)])
            ticket = fleet.dispatch(decision, request, now)
            ticket.first_token(now + LATENCY.prefill(61))
            end = now + LATENCY.prefill(61) + decode * 39 * LATENCY.decode
            ticket.finished(end, Usage(60 * BLOCK + 1, 40, 0))
            ticket.release(end)
    slow, fast = fleet.workers(next(clock))
    assert slow.decode_factor / fast.decode_factor == pytest.approx(SLOW, rel=0.25)
    assert slow.latency_factor == fast.latency_factor
    now = next(clock)
    confirm(fleet, now)
    prompt = tokens(10)
    fleet.apply_snapshot(url_of(0), snapshot(info("w0"), 1, list(ask(prompt).keys.all(above=0))), now)  # type: ignore[union-attr]
    stream, whole = (fleet.choose(ask(prompt, streaming=kind, output=100), now) for kind in (True, False))
    assert (stream.url, whole.url) == (url_of(0), url_of(1))
    for candidate in whole.candidates:
        assert candidate.cost == pytest.approx(
            candidate.queue_seconds + candidate.prefill_seconds + candidate.decode_seconds
            + 4 * (candidate.prefill_seconds - whole.candidates[0].prefill_seconds)
        )  # fmt: skip


def test_an_engine_whose_whole_answers_are_overdue_looks_worse_with_time(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    request = ask(tokens(60), streaming=False, output=10)
    decision, ticket = send(fleet, request, 0.0)
    expected = decision.predicted_ttft + 10 * LATENCY.decode
    queues = [fleet.workers(now)[0].queue_seconds for now in (0.9 * expected, 2.5 * expected, 3.5 * expected)]
    assert queues[0] < expected
    assert queues[2] - queues[1] == pytest.approx(expected, rel=0.1)
    ticket.release(4 * expected)
    assert fleet.workers(4 * expected)[0].queue_seconds == 0.0


def test_prefills_that_ended_together_teach_before_the_next_one_ends(make_fleet: MakeFleet) -> None:
    """Five long prompts at once: a slow engine answers two after its first step and goes on with the others."""
    fleet = make_fleet(1)
    confirm(fleet, 0.0)
    sent = [send(fleet, ask(tokens(60, start=1000 * n)), 0.0)[1] for n in range(5)]
    end = 2 * SLOW * LATENCY.prefill(61)
    for ticket in sent[:2]:
        ticket.first_token(end)
    assert fleet.workers(end)[0].latency_factor == 1.0, "the step may have been that of more"
    fleet.choose(ask(tokens(60, start=90_000)), 1.5 * end)
    assert fleet.workers(1.5 * end)[0].latency_factor > 1.2


def serve_beside_another_router(
    fleet: Fleet, clock: Iterator[float], *, streaming: bool, says: bool, restarted: bool = False
) -> None:
    """One worker, `SLOW` times as slow at everything, with two requests of another router on it, which sends it three
    prompts of 60 blocks while it serves one of ours. `says`: its reports count what it has prefilled; `restarted`:
    from 0 again in the middle of each answer."""

    def report(at: float, running: int, count: int, computed: int) -> None:
        counts = (count + 1, computed * BLOCK) if says else (0, 0)
        fleet.apply_batch(url_of(0), Batch(1, 0, (), Load(running, 0, 0, 9000, 10_000, *counts)), at)

    count = computed = 1000
    for turn in range(100):
        now = next(clock)
        blocks, output = (200, 10) if turn % 2 else (10, 100)
        if restarted:
            count = computed = 1000

        report(now, 2, count, computed)
        _, ticket = send(fleet, ask(tokens(blocks, start=int(now) * 1000), streaming=streaming), now)
        first = now + SLOW * LATENCY.prefill(blocks + 1)
        count, computed = count + 1, computed + blocks + 1
        report(first, 3, count, computed)
        if streaming:
            ticket.first_token(first)
        end = first + SLOW * ((output - 1 - 3) * LATENCY.decode + 3 * LATENCY.prefill(60))
        count, computed = (0, 0) if restarted else (count + 3, computed + 3 * 60)
        report(end, 3, count, computed)
        ticket.finished(end, Usage(blocks * BLOCK + 1, output, 0))
        ticket.release(end)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_what_a_worker_counts_teaches_beside_other_routers_too(
    make_fleet: MakeFleet, clock: Iterator[float], streaming: bool
) -> None:
    fleet = make_fleet(1)
    serve_beside_another_router(fleet, clock, streaming=streaming, says=True)
    (worker,) = fleet.workers(next(clock))
    assert worker.latency_factor == pytest.approx(SLOW, rel=0.15)
    assert worker.decode_factor == pytest.approx(SLOW, rel=0.15)


@pytest.mark.parametrize(("says", "restarted"), [(False, False), (True, True)], ids=["not said", "restarted"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_nothing_is_learnt_beside_other_routers_without_the_workers_counts(
    make_fleet: MakeFleet, clock: Iterator[float], streaming: bool, says: bool, restarted: bool
) -> None:
    fleet = make_fleet(1)
    serve_beside_another_router(fleet, clock, streaming=streaming, says=says, restarted=restarted)
    (worker,) = fleet.workers(next(clock))
    assert (worker.latency_factor, worker.decode_factor) == (1.0, 1.0)
