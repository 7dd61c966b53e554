from __future__ import annotations

import pytest

from router.core.fleet import Fleet
from tests.router.core.support import MakeFleet, config, info, snapshot, url_of


@pytest.fixture
def make_fleet() -> MakeFleet:
    """A fleet of `workers` workers that are ready at time 0 with an empty cache."""

    def make(workers: int = 2, **changes: object) -> Fleet:
        fleet = Fleet(config(**changes))
        for number in range(workers):
            fleet.add(url_of(number))
            fleet.apply_snapshot(url_of(number), snapshot(info(f"w{number}")), 0.0)
        return fleet

    return make
