"""How samples of observed and predicted times become factors of the fleet and of each worker.

Not covered: where the samples come from (test_latency_samples.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.latency_correction import FASTEST, HALF_LIFE, SLOWEST, FleetCorrection, Span, WorkerCorrection

FULL = Span(1.0, 1.0)
PREFILL = Span(1.0, 0.0)


def worker(fleet: FleetCorrection) -> WorkerCorrection:
    return WorkerCorrection(fleet, FULL)


def learn(correction: WorkerCorrection, ratio: float, samples: int = 60, span: Span = PREFILL) -> None:
    for _ in range(samples):
        correction.observe(span, ratio * (span.prefill + span.decode), 0.0)


def test_wrong_constants_of_a_profile_are_corrected_for_the_whole_fleet() -> None:
    fleet = FleetCorrection()
    seen, unseen = worker(fleet), worker(fleet)
    learn(seen, 3.0)
    assert seen.prefill.factor(0.0) == pytest.approx(3.0, rel=0.05)
    assert unseen.prefill.factor(0.0) == pytest.approx(3.0, rel=0.05), "a worker without samples is like the fleet"
    assert seen.decode.factor(0.0) == 1.0


def test_equal_engines_stay_equal_under_noise() -> None:
    fleet = FleetCorrection()
    workers = [worker(fleet) for _ in range(4)]
    for turn in range(200):
        workers[turn % 4].observe(Span(1.0, 1.0), 2 * (0.9, 1.0, 1.1)[turn % 3], 0.0)
        for kind in ("prefill", "decode"):
            assert len({getattr(correction, kind).factor(0.0) for correction in workers}) == 1


def test_a_slow_engine_is_told_from_the_rest_and_gets_another_chance_in_time() -> None:
    fleet = FleetCorrection()
    workers = [worker(fleet) for _ in range(4)]
    for turn in range(400):
        workers[turn % 4].observe(Span(1.0, 0.0), 4.0 if turn % 4 == 0 else 1.0, 0.0)
    slow, *others = (correction.prefill.factor(0.0) for correction in workers)
    assert slow / others[0] == pytest.approx(4.0, rel=0.3)
    assert max(others) / min(others) < 1.3
    assert len({correction.prefill.factor(5 * HALF_LIFE) for correction in workers}) == 1


def test_a_slow_engine_that_gets_little_is_as_slow_as_it_was() -> None:
    """What is known of one worker does not follow from what the others get meanwhile."""
    fleet = FleetCorrection()
    slow, fast = worker(fleet), worker(fleet)
    for _ in range(20):
        slow.observe(Span(1.0, 0.0), 4.0, 0.0)
        fast.observe(Span(1.0, 0.0), 1.0, 0.0)
    learn(fast, 1.0, samples=200)
    assert slow.prefill.factor(0.0) == pytest.approx(4.0, rel=0.05)
    assert fast.prefill.factor(0.0) == pytest.approx(1.0, rel=0.05)


def test_one_stalled_request_moves_little() -> None:
    fleet = FleetCorrection()
    correction, other = worker(fleet), worker(fleet)
    learn(correction, 1.0)
    learn(other, 1.0)
    correction.observe(Span(1.0, 0.0), 500.0, 0.0)
    assert correction.prefill.factor(0.0) == other.prefill.factor(0.0) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("ratio", "bound"), [(1e9, SLOWEST), (1e-9, FASTEST)], ids=["slowest", "fastest"])
@pytest.mark.parametrize("span", [Span(1.0, 0.0), Span(0.0, 1.0), Span(1.0, 1.0)], ids=["prefill", "decode", "both"])
def test_the_corrections_are_bounded(ratio: float, bound: float, span: Span) -> None:
    correction = worker(FleetCorrection())
    learn(correction, ratio, samples=500, span=span)
    for done, factor in ((span.prefill, correction.prefill), (span.decode, correction.decode)):
        assert factor.factor(0.0) == pytest.approx(bound if done else 1.0, rel=0.01)


def test_short_samples_weigh_little_and_empty_ones_nothing() -> None:
    fleet = FleetCorrection()
    correction = worker(fleet)
    learn(correction, 9.0, samples=1, span=Span(0.03, 0.03))
    correction.observe(Span(0.0, 0.0), 1.0, 0.0)
    correction.observe(Span(1.0, 1.0), 0.0, 0.0)
    correction.observe(Span(1.0, 1.0), 9.0, 0.0, trust=0.0)
    assert correction.prefill.factor(0.0) < 1.1
    assert correction.decode.factor(0.0) < 1.1


@given(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]))
def test_sums_of_prefill_and_decode_tell_the_two_apart(prefill: float, decode: float) -> None:
    """A whole answer shows only how long both took together; answers of different shares show each."""
    correction = worker(FleetCorrection())
    for turn in range(1200):
        span = (Span(4.0, 0.5), Span(1.0, 1.0), Span(0.5, 4.0))[turn % 3]
        correction.observe(span, prefill * span.prefill + decode * span.decode, 0.0)
    assert correction.prefill.estimate == pytest.approx(prefill, rel=0.15)
    assert correction.decode.estimate == pytest.approx(decode, rel=0.15)
