"""Decisions of `cache_aware` in a large fleet that has workers without requests: most end at one of these.

A worker without requests costs a request nothing but its prefill, the same on each that holds equally much of the
prompt. Where some of these hold as much as any worker does, no other worker can cost less, and what is to be shown is
only that none that has requests costs so little more that it counts as equal. Bounds of what decoding together costs
show it: they hold for all workers, are widened as these change, and are made tight now and then. So such a decision
looks at the workers that changed since the last one and at those without requests, and computes no cost. Where this
does not show who is chosen, `choose` says so, and all costs are computed (`router.core.field`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from kvcache.profiles import blocks_to_compute
from router.core.standing import Changes
from router.core.table import Rows, Table
from router.core.work import LEFT, Learnt, Work, blocks_taken
from router.core.worker import Worker

if TYPE_CHECKING:
    from router.core.catalogue import Candidates
    from router.core.config import FleetConfig
    from router.core.field import Question
    from router.core.strategies import Conditions

ROUNDING = 1.0 + 1e-9
"""By more than this factor two sums of the same figures never differ."""


class IdleWorkers:
    """The workers of a table that have no requests. `choose` is O(changed workers) and a few vector operations."""

    def __init__(self, table: Table, config: FleetConfig, learnt: Learnt, changes: Changes) -> None:
        self._table = table
        self._config = config
        self._learnt = learnt
        self._changes = changes
        self._members = -1
        self._odd: set[Work] = set()
        """Those of which more matters than is noted here: requests that do not stream, that load blocks, or that are
        other routers'."""
        self._skip = self._pause = 0
        """How many decisions do not look here, after several at which that was in vain: twice as many each time."""
        self._columns = np.empty((4, 0))
        self._open()

    def _open(self) -> None:
        self._left, self._theirs, self._room, self._assigned = self._columns
        views = [column.data.cast("B").cast("d") for column in self._columns]
        self._write_left, self._write_theirs, self._write_room, self._write_assigned = views
        self._least_left = self._least_theirs = self._least_room = math.inf

    def choose(self, question: Question, candidates: Candidates, conditions: Conditions) -> int | None:
        """The row that `selection.cache_aware` chooses; None: it is not known here."""
        if self._skip:
            self._skip -= 1
            return None
        row = self._choose(question, candidates, conditions)
        if row is None:
            self._pause = min(max(1, 2 * self._pause), len(self._table.workers))
            self._skip = self._pause
        else:
            self._pause = 0
        return row

    def _choose(self, question: Question, candidates: Candidates, conditions: Conditions) -> int | None:
        table = self._table
        table.follow()
        if self._members != table.members:
            self._members = table.members
            self._odd.clear()
            self._columns = np.full((4, len(table.workers)), np.inf)
            self._open()
        self._look(candidates.members)
        if (
            self._odd
            or conditions.spreading
            or conditions.session_url is not None
            or not question.streaming
            or question.matches.loads
            or len(table.kinds) != 1
            or not self._apart(question, conditions.tie_seconds)
        ):
            return None
        rows = self._rows(question, candidates)
        if not rows.size:
            return None
        assigned = table.least_assigned(rows, self._assigned[rows], question.now, self._config.assigned_half_life)
        if len(assigned) == 1:
            return assigned[0][1]
        workers = table.workers
        return min(assigned, key=lambda each: (each[0], workers[each[1]].turn))[1]

    def _look(self, among: Collection[Worker]) -> None:
        """Note those that have changed."""
        latency, half_life = self._config.latency, self._config.assigned_half_life
        sequence, token = latency.decode_sequence, latency.decode_token
        odd = self._odd
        left_of, theirs_of, room_of, assigned_of = (
            self._write_left, self._write_theirs, self._write_room, self._write_assigned,
        )  # fmt: skip
        for work in self._table.take_changed(among):
            if not work.plain:
                odd.add(work)
                continue
            if odd:
                odd.discard(work)
            row, ledger = work.row, work.ledger
            own = ledger.in_flight
            if own:
                left = LEFT * (ledger.output / own)
                theirs = sequence * own + token * ledger.reserved
                left_of[row] = left
                theirs_of[row] = theirs
                room_of[row] = math.inf
                if left < self._least_left:
                    self._least_left = left
                if theirs < self._least_theirs:
                    self._least_theirs = theirs
            else:
                left_of[row] = theirs_of[row] = math.inf
                room_of[row] = room = work.room
                assigned_of[row] = work.assigned_log(half_life)
                if room < self._least_room:
                    self._least_room = room

    def tighten(self) -> None:
        """Compute the bounds anew."""
        self._least_left, self._least_theirs, self._least_room = (
            float(column.min(initial=math.inf)) for column in (self._left, self._theirs, self._room)
        )

    def _apart(self, question: Question, tie_seconds: float) -> bool:
        """Whether on workers without requests the request costs its prefill alone, and on all others by more than a tie
        more than on those of them that hold the most."""
        shape, latency, correction = question.shape, self._config.latency, self._learnt.correction
        if not correction.even or latency.prefill_cached > latency.prefill(1):
            return False
        ((size, groups),) = self._table.kinds
        cached = question.best * self._config.block_size
        if blocks_taken(shape, cached, 0, size, groups) > self._least_room:
            return False
        blocks = blocks_to_compute(shape.prompt_tokens, cached, size, latency.block_size)
        prefill = latency.prefill(blocks) * correction.prefill.factor
        mine = latency.decode_sequence + latency.decode_token * (shape.prompt_tokens + int(shape.output) // 2)
        slowdown = min(shape.output, self._least_left) * (mine + self._least_theirs) * correction.decode.factor
        return prefill + slowdown > (prefill + tie_seconds) * ROUNDING

    def _rows(self, question: Question, candidates: Candidates) -> Rows:
        """The candidates without requests that hold as much of the prompt as any does, in their order."""
        idle = self._left == math.inf
        rows: Rows = candidates.rows
        rows = np.flatnonzero(idle) if rows.size == idle.size else rows[idle[rows]]
        holders = 0
        for slots, depth in question.matches.runs:
            if depth == question.best:
                holders |= slots
        if holders and holders != self._table.slots:
            holds = np.zeros(idle.size, bool)
            holds[self._table.rows_of(holders)] = True
            rows = rows[holds[rows]]
        return rows
