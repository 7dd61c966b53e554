"""The back-off that every process shares.

Covers: growth, bound and spread of the delays. Not covered: that each caller counts its failures and sleeps (its own
tests do).
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backoff import Backoff

BACKOFF = Backoff(0.1, 5.0)


def test_delays_double_up_to_the_longest() -> None:
    delays = [BACKOFF.delay(failures) for failures in range(1, 9)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_iterating_gives_the_same_delays_each_time_anew() -> None:
    for _ in range(2):
        assert list(itertools.islice(BACKOFF, 100)) == [BACKOFF.delay(failures) for failures in range(1, 101)]


@given(failures=st.integers(1, 10**9), chance=st.floats(0, 1), first=st.floats(1e-6, 1e6))
def test_chance_takes_away_half_at_most(failures: int, chance: float, first: float) -> None:
    backoff = Backoff(first, 60.0)
    whole = backoff.delay(failures)
    assert whole <= 60.0
    assert 0.5 * whole <= backoff.delay(failures, chance) <= whole
    assert backoff.delay(failures, 0.0) == 0.5 * whole


def test_delays_of_different_processes_are_spread() -> None:
    rng = random.Random(1)
    assert len({BACKOFF.delay(3, rng.random()) for _ in range(100)}) == 100
