from __future__ import annotations

import pytest

from router.core.pace import FASTEST, HALF_LIFE, SLOWEST, FleetPace, WorkerPace


def learn(pace: WorkerPace, ratio: float, samples: int = 60, blocks: int = 100) -> None:
    for _ in range(samples):
        pace.observe(1.0, ratio, blocks, 0.0)


def test_wrong_constants_of_a_profile_heal_for_the_whole_fleet() -> None:
    fleet = FleetPace()
    seen, unseen = WorkerPace(fleet), WorkerPace(fleet)
    learn(seen, 3.0)
    assert seen.factor(0.0) == pytest.approx(3.0, rel=0.05)
    assert unseen.factor(0.0) == pytest.approx(3.0, rel=0.05), "a worker without samples is like the fleet"


def test_equal_engines_stay_equal_under_noise() -> None:
    fleet = FleetPace()
    workers = [WorkerPace(fleet) for _ in range(4)]
    for turn in range(200):
        workers[turn % 4].observe(1.0, (0.9, 1.0, 1.1)[turn % 3], 64, 0.0)
        assert len({worker.factor(0.0) for worker in workers}) == 1


def test_a_slow_engine_is_told_from_the_rest_and_gets_another_chance_in_time() -> None:
    fleet = FleetPace()
    workers = [WorkerPace(fleet) for _ in range(4)]
    for turn in range(400):
        workers[turn % 4].observe(1.0, 4.0 if turn % 4 == 0 else 1.0, 64, 0.0)
    slow, *others = (worker.factor(0.0) for worker in workers)
    assert slow / others[0] == pytest.approx(4.0, rel=0.3)
    assert max(others) / min(others) < 1.3
    assert len({worker.factor(5 * HALF_LIFE) for worker in workers}) == 1


def test_one_stalled_request_moves_little() -> None:
    fleet = FleetPace()
    pace, other = WorkerPace(fleet), WorkerPace(fleet)
    learn(pace, 1.0)
    learn(other, 1.0)
    pace.observe(1.0, 500.0, 100, 0.0)
    assert pace.factor(0.0) == other.factor(0.0) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("ratio", "bound"), [(1e9, SLOWEST), (1e-9, FASTEST), (0.0, FASTEST)])
def test_the_correction_is_bounded(ratio: float, bound: float) -> None:
    pace = WorkerPace(FleetPace())
    learn(pace, ratio, samples=500)
    assert pace.factor(0.0) == pytest.approx(bound, rel=0.01)


def test_short_prefills_weigh_little_and_cached_ones_nothing() -> None:
    fleet = FleetPace()
    pace = WorkerPace(fleet)
    learn(pace, 9.0, samples=1, blocks=1)
    assert pace.factor(0.0) < 1.1
    learn(pace, 9.0, samples=50, blocks=0)
    pace.observe(0.0, 1.0, 10, 0.0)
    assert pace.factor(0.0) < 1.1
