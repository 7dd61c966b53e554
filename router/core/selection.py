"""The rules of `router.core.strategies` for many workers: the same choices, by narrowing down the rows of a `Field`.

Each function returns the row that the strategy of the same name chooses among `rows` (in the order of the candidates).
It costs a few vector operations. A strategy that has none here looks at every candidate, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from router.core import strategies
from router.core.field import Field, Figure
from router.core.strategies import Conditions, Strategy
from router.core.table import Floats, Rows


def least(rows: Rows, figures: Figure) -> Rows:
    """Those of the rows that have the least figure."""
    if isinstance(figures, float):
        return rows
    own = figures[rows]
    fewest: Rows = rows[own == own.min()]
    return fewest


def most(rows: Rows, figures: Figure) -> Rows:
    """Those of the rows that have the largest figure."""
    if isinstance(figures, float):
        return rows
    own = figures[rows]
    largest: Rows = rows[own == own.max()]
    return largest


def _first(rows: Rows, turns: Floats) -> int:
    """The row that has waited longest; of those that never had a turn, the first."""
    return int(rows[turns[rows].argmin()])


def cache_aware(field: Field, rows: Rows, conditions: Conditions) -> int:
    cost = field.cost
    if rows.size == cost.size:  # all of them, whose rows are in the order of the candidates
        rows = np.flatnonzero(cost <= cost.min() + conditions.tie_seconds)
    else:
        cost = cost[rows]
        rows = rows[cost <= cost.min() + conditions.tie_seconds]
    session = field.row_of(conditions.session_url) if conditions.session_url is not None else -1
    if conditions.session_hint and session not in least(rows, field.in_flight):
        session = -1
    if not conditions.spreading:
        rows = most(rows, field.matched_blocks)
    if session >= 0 and session in rows:
        return session
    assigned = field.assigned_seconds(rows)
    in_flight, turn = field.in_flight, field.turn
    _, chosen = min(assigned, key=lambda each: (each[0], in_flight[each[1]], turn[each[1]]))
    return chosen


def longest_prefix(field: Field, rows: Rows, conditions: Conditions) -> int:
    return _first(most(rows, field.matched_blocks), field.turn)


def round_robin(field: Field, rows: Rows, conditions: Conditions) -> int:
    return _first(rows, field.turn)


def least_loaded(field: Field, rows: Rows, conditions: Conditions) -> int:
    return _first(least(rows, field.in_flight), field.turn)


def lmetric(field: Field, rows: Rows, conditions: Conditions) -> int:
    prefill = field.queue_seconds - field.memory_seconds + field.prefill_seconds
    return _first(least(rows, prefill * (field.in_flight + 1.0)), field.turn)


def linear(field: Field, rows: Rows, conditions: Conditions) -> int:
    prefill = field.queue_seconds - field.memory_seconds + field.prefill_seconds
    return _first(least(rows, prefill / conditions.block_seconds + field.active_blocks), field.turn)


SELECTIONS: Mapping[Strategy, Callable[[Field, Rows, Conditions], int]] = {
    strategies.cache_aware: cache_aware,
    strategies.longest_prefix: longest_prefix,
    strategies.round_robin: round_robin,
    strategies.least_loaded: least_loaded,
    strategies.lmetric: lmetric,
    strategies.linear: linear,
}
