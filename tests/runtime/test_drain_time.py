"""How long a process that was told to stop goes on taking requests.

Covers: `Drain` on virtual time. Not covered: what clients see meanwhile (test_draining.py), whether another router
serves (tests/router/discovery/test_replacement.py).
"""

from __future__ import annotations

import asyncio
import math

import pytest

from runtime.draining import POLL, QUIET, Drain, DrainPolicy
from tests import virtual


def drained(
    policy: DrainPolicy,
    *,
    requests: tuple[float, ...] = (),
    replaced_at: float | None = None,
    fails: bool = False,
    hangs: bool = False,
    forbidden_at: float = math.inf,
    known: bool = True,
    cut_at: float | None = None,
) -> float:
    """Seconds that it took. Requests come at the given times; another serves from `replaced_at` on (`known`: somebody
    can tell)."""

    async def main(loop: virtual.CountingLoop) -> float:
        async def replaced() -> bool:
            if hangs:
                await asyncio.Event().wait()
            if loop.time() >= forbidden_at:
                raise PermissionError("the Role is gone")
            if fails:
                raise OSError("the API server is away")
            return replaced_at is not None and loop.time() >= replaced_at

        cut = asyncio.Event()
        if cut_at is not None:
            loop.call_later(cut_at, cut.set)
        drain = Drain(
            policy,
            loop.time,
            last_request=lambda: max((at for at in requests if at <= loop.time()), default=-math.inf),
            replaced=replaced if known else None,
        )
        await drain.wait(cut)
        return loop.time()

    return virtual.run(main)


@pytest.mark.parametrize("known", [False, True])
def test_without_a_delay_or_a_limit_it_is_over_at_once(known: bool) -> None:
    assert drained(DrainPolicy(0.0, 0.0), requests=(0.0,), known=known) == 0.0


def test_the_delay_is_kept_though_another_serves() -> None:
    assert drained(DrainPolicy(5.0, 30.0), replaced_at=0.0) == 5.0


def test_it_lasts_until_the_delay_after_another_serves() -> None:
    assert drained(DrainPolicy(5.0, 30.0), replaced_at=8.0) == pytest.approx(8.0 + 5.0, abs=POLL)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({}, id="nobody else"),
        pytest.param({"fails": True}, id="the answer fails"),
        pytest.param({"hangs": True}, id="no answer"),
    ],
)
def test_it_never_lasts_longer_than_the_limit(state: dict[str, bool]) -> None:
    assert drained(DrainPolicy(5.0, 30.0), **state) == pytest.approx(30.0)  # type: ignore[arg-type]


def test_a_limit_below_the_delay_means_the_delay() -> None:
    assert drained(DrainPolicy(5.0, 0.0)) == pytest.approx(5.0)


def test_where_nobody_can_tell_it_lasts_while_requests_come() -> None:
    every_second = tuple(map(float, range(12)))
    assert drained(DrainPolicy(0.0, 30.0), requests=every_second, known=False) == pytest.approx(11.0 + QUIET)
    assert drained(DrainPolicy(0.0, 30.0), requests=tuple(map(float, range(60))), known=False) == pytest.approx(30.0)
    assert drained(DrainPolicy(0.0, 30.0), known=False) == pytest.approx(QUIET), "the next may be on its way"
    assert drained(DrainPolicy(5.0, 30.0), known=False) == pytest.approx(5.0)


def test_nobody_can_tell_who_is_not_allowed_to_look() -> None:
    assert drained(DrainPolicy(0.0, 30.0), forbidden_at=0.0) == pytest.approx(QUIET)
    assert drained(DrainPolicy(5.0, 30.0), forbidden_at=0.0) == pytest.approx(5.0)
    assert drained(DrainPolicy(5.0, 30.0), forbidden_at=7.0) == pytest.approx(7.0, abs=POLL)
    every_second = tuple(map(float, range(60)))
    assert drained(DrainPolicy(5.0, 30.0), forbidden_at=0.0, requests=every_second) == pytest.approx(30.0)


def test_it_can_be_cut_short() -> None:
    assert drained(DrainPolicy(5.0, 30.0), cut_at=3.0) == pytest.approx(3.0)
