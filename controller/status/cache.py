"""Hit rate and view age over all routers, held still against noise so that an idle cluster writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from controller.status import raw
from controller.status.report import RouterReport

AGES = (1, 2, 5, 10, 30, 60, 300)
"""Values of viewAgeSeconds: the smallest one that is not exceeded; 300 stands for all beyond."""
HELD_PERMILLE = 5
"""A hit rate that differs by less is left as it was."""


def hit_rate_permille(reports: Iterable[RouterReport], previous: int | None) -> int | None:
    """Prompt tokens served from the caches since the routers started, in thousandths.

    None before the first request; what was known stays while nothing newer is (the routers have just started again).
    """
    asked = list(reports)
    prompt = sum(report.prompt_tokens for report in asked)
    if not prompt:
        return previous
    rate = round(1000 * sum(report.cached_tokens for report in asked) / prompt)
    return previous if previous is not None and abs(rate - previous) < HELD_PERMILLE else rate


def view_age(reports: Iterable[RouterReport], previous: int | None) -> int | None:
    """Age of the oldest view any router has of a ready worker, in seconds; None while there is none.

    Ages swing by the second between two reports of a worker, so the value moves up when it is exceeded by half, and
    down at half of the next smaller one.
    """
    ages = [report.view_age_seconds for report in reports if report.view_age_seconds is not None]
    if not ages:
        return None
    oldest = max(ages)
    if previous in AGES and previous is not None:
        below = AGES[max(0, AGES.index(previous) - 1)]
        if (oldest <= 1.5 * previous or previous == AGES[-1]) and (oldest > below / 2 or previous == AGES[0]):
            return previous
    return next((age for age in AGES if oldest <= age), AGES[-1])


def percent(permille: int) -> str:
    """`82.3%`."""
    return f"{permille // 10}.{permille % 10}%"


def cache_status(reports: Iterable[RouterReport], previous: Mapping[str, Any]) -> dict[str, Any]:
    """`cache` of the status: only what is known."""
    asked = list(reports)
    held, aged = raw.at(previous, "hitRatePermille"), raw.at(previous, "viewAgeSeconds")
    rate = hit_rate_permille(asked, held if type(held) is int else None)
    age = view_age(asked, aged if type(aged) is int else None)
    known = {"hitRatePermille": rate, "viewAgeSeconds": age}
    return {name: value for name, value in known.items() if value is not None}
