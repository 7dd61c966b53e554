from __future__ import annotations

import pytest

from router.core.pace import FASTEST, SLOWEST, FleetPace, WorkerPace


def learn(pace: WorkerPace, ratio: float, samples: int = 50, blocks: int = 100) -> None:
    for _ in range(samples):
        pace.observe(1.0, ratio, blocks)


def test_wrong_constants_of_a_profile_heal_for_the_whole_fleet() -> None:
    fleet = FleetPace()
    seen, unseen = WorkerPace(fleet), WorkerPace(fleet)
    learn(seen, 3.0)
    assert seen.factor == pytest.approx(3.0, rel=0.05)
    assert unseen.factor == pytest.approx(3.0, rel=0.05), "a worker without samples is like the fleet"


def test_equal_engines_stay_equal_under_noise() -> None:
    fleet = FleetPace()
    workers = [WorkerPace(fleet) for _ in range(4)]
    for turn in range(200):
        workers[turn % 4].observe(1.0, (0.9, 1.0, 1.1, 1.05)[turn % 3], 64)
    assert len({worker.factor for worker in workers}) == 1


def test_a_slow_engine_is_told_from_the_rest() -> None:
    fleet = FleetPace()
    workers = [WorkerPace(fleet) for _ in range(4)]
    for turn in range(400):
        workers[turn % 4].observe(1.0, 4.0 if turn % 4 == 0 else 1.0, 64)
    slow, *others = (worker.factor for worker in workers)
    assert slow / others[0] == pytest.approx(4.0, rel=0.3)
    assert max(others) / min(others) < 1.3


@pytest.mark.parametrize(("ratio", "bound"), [(1e9, SLOWEST), (1e-9, FASTEST), (0.0, FASTEST)])
def test_the_correction_is_bounded(ratio: float, bound: float) -> None:
    pace = WorkerPace(FleetPace())
    learn(pace, ratio, samples=500)
    assert pace.factor == pytest.approx(bound, rel=0.01)


def test_short_prefills_weigh_little_and_cached_ones_nothing() -> None:
    fleet = FleetPace()
    pace = WorkerPace(fleet)
    learn(pace, 9.0, samples=1, blocks=1)
    assert pace.factor < 1.1
    learn(pace, 9.0, samples=50, blocks=0)
    pace.observe(0.0, 1.0, 10)
    assert pace.factor < 1.1
