"""Arrival processes: their mean rate and their spread, and that seeds decide them.

Not covered: the workloads that they drive (test_workloads.py, test_workload_files.py).
"""

from __future__ import annotations

from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.workloads import Arrivals, Process, WorkloadError, WorkloadSpec, build_workload

SPREADS = {Process.CONSTANT: 0.0, Process.POISSON: 1.0, Process.GAMMA: 2.0}


def gaps(arrivals: Arrivals, rate: float, seed: int = 0, count: int = 4000) -> list[float]:
    times = [0.0, *islice(arrivals.times(Random(seed), rate), count)]
    return [after - before for before, after in pairwise(times)]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(Process), st.floats(0.01, 1000), st.integers(0, 99))
def test_gaps_have_the_mean_and_the_spread_of_their_process(process: Process, rate: float, seed: int) -> None:
    seen = gaps(Arrivals(process), rate, seed)
    spread = SPREADS[process]
    # Five standard errors of the mean of 4,000 gaps.
    assert fmean(seen) * rate == pytest.approx(1.0, abs=5 * spread / 4000**0.5 + 1e-9)
    assert pstdev(seen) * rate == pytest.approx(spread, rel=0.3, abs=1e-6)
    assert min(seen) >= 0


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 4), st.integers(0, 99))
def test_gamma_has_the_spread_that_is_asked_for(cv: float, seed: int) -> None:
    seen = gaps(Arrivals(Process.GAMMA, cv), 7.0, seed)
    assert fmean(seen) * 7 == pytest.approx(1.0, abs=5 * cv / 4000**0.5)
    assert pstdev(seen) / fmean(seen) == pytest.approx(cv, rel=0.4)


def test_a_seed_decides_the_arrivals() -> None:
    assert gaps(Arrivals(), 3.0, 1, 50) == gaps(Arrivals(), 3.0, 1, 50)
    assert gaps(Arrivals(), 3.0, 1, 50) != gaps(Arrivals(), 3.0, 2, 50)


@pytest.mark.parametrize(
    ("process", "cv", "message"),
    [(Process.POISSON, 2.0, "a CV is for gamma arrivals"), (Process.GAMMA, 0.0, "must be between 0.01 and 100")],
    ids=["of another process", "none"],
)
def test_a_spread_that_does_not_go_with_the_process_is_refused(process: Process, cv: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrivals(process, cv)


@pytest.mark.parametrize("name", ["chat", "uniform", "hot", "answers"])
def test_workloads_come_as_they_are_told(name: str) -> None:
    """The same requests, at other times, at the same rate."""
    poisson, constant = (
        build_workload(WorkloadSpec(name, limit=60, rate=20.0, arrivals=arrivals))
        for arrivals in (None, Arrivals(Process.CONSTANT))
    )
    assert (poisson.config["arrivals"], constant.config["arrivals"]) == ("poisson", "constant")
    times = [request.at for request in constant.requests()]
    assert times != [request.at for request in poisson.requests()]
    if name != "chat":  # where a session's requests follow one another
        assert times == pytest.approx([(n + 1) / 20 for n in range(60)])


def test_agents_come_when_their_last_call_is_over() -> None:
    with pytest.raises(WorkloadError, match="leave --arrivals out"):
        build_workload(WorkloadSpec("agents", arrivals=Arrivals()))
