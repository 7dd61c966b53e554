"""The standings of all workers in columns, so that a decision computes with all of them at once.

Each worker has a row, in the order in which the workers joined. Rows are written anew only for workers that have
changed (`Changes`), or whose standing ends by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcache.feed import CacheGroup
from router.core.index import bits
from router.core.standing import NEVER, Changes, Standing
from router.core.work import Work
from router.core.worker import Worker

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.intp]

FEW = 8
"""The rows of so many slots or fewer are looked up one by one."""
_UNTIL, _LATE, _FOREIGN_SECONDS, _FOREIGN = map(
    Standing._fields.index, ("until", "late_from", "foreign_seconds", "foreign")
)


class Table:
    """`columns[i]` has field i of `Standing` for each row. `refresh` is O(changed workers) and a few vector operations;
    O(workers) after one has joined or left."""

    def __init__(self, workers: Mapping[str, Worker], changes: Changes) -> None:
        self._fleet = workers
        self._changes = changes
        self.members = -1
        """Which of the fleet's changes of members the rows are of."""
        self._taken: set[Work] = set()
        """Those that have changed, and of which `take_changed` has told."""
        self._unseen: set[Work] = set()
        """Those whose rows are written, and of which it has not told."""
        self.workers: list[Worker] = []
        self.columns: Floats = np.empty((len(Standing._fields), 0))
        self.column: dict[str, Floats] = {}
        """The columns by name."""
        self.slots = 0
        """The bitmask of the slots of all workers."""
        self.foreign: set[int] = set()
        """The rows of workers that have requests, or prefills, of other routers."""
        self.silent: set[int] = set()
        """Those that have requests which do not stream."""
        self.kinds: list[tuple[int, tuple[CacheGroup, ...]]] = []
        """The different shapes of caches: tokens of a block, and groups."""
        self.kind: Rows = np.empty(0, np.intp)
        """Which of them each row has."""
        self._until = NEVER
        """When the first standing ends by itself, or earlier."""
        self._row_of: Rows = np.empty(0, np.intp)
        """By slot."""
        self._sought, self._found = 0, np.empty(0, np.intp)
        """What `rows_of` was last asked for, and its answer: many prompts begin alike."""

    def follow(self) -> None:
        """Make the rows anew if workers have joined or left."""
        if self.members != self._changes.members:
            self._rebuild()

    def take_changed(self, among: Collection[Worker]) -> set[Work]:
        """The workers `among` that have changed since the last call."""
        works, workers = self._changes.works, self.workers
        told = works | self._unseen if self._unseen else works.copy()
        if len(among) != len(workers):
            told = {work for work in told if workers[work.row] in among}
        self._taken |= works & told
        works -= told
        self._unseen -= told
        return told

    def refresh(self, now: float, among: Collection[Worker]) -> None:
        """Bring the rows of the workers `among` up to date."""
        self.follow()
        changed, workers = self._changes.works, self.workers
        rows = [work.row for work in changed]
        rows += [work.row for work in self._taken]
        if self._until <= now:
            rows += np.flatnonzero(self.columns[_UNTIL] <= now).tolist()
        rows = [row for row in set(rows) if workers[row] in among]
        if not rows:
            return
        standings = []
        foreign, silent, until = self.foreign, self.silent, self._until
        for row in rows:
            work = workers[row].work
            standing = work.standing(workers[row].turn, now)
            standings.append(standing)
            if standing[_FOREIGN] or standing[_FOREIGN_SECONDS]:
                foreign.add(row)
            elif foreign:
                foreign.discard(row)
            if standing[_LATE] != NEVER:
                silent.add(row)
            elif silent:
                silent.discard(row)
            if standing[_UNTIL] < until:
                until = standing[_UNTIL]
            self._taken.discard(work)
            if work in changed:
                changed.remove(work)
                self._unseen.add(work)
        self.columns[:, rows] = np.array(standings).T
        self._until = until if until > now else float(self.columns[_UNTIL].min())

    def rows_of(self, slots: int) -> Rows | list[int]:
        """The rows of the slots of a bitmask, in no order."""
        if slots.bit_count() <= FEW:
            return [int(self._row_of[slot]) for slot in bits(slots)]
        if slots != self._sought:
            self._sought, self._found = slots, self._rows_of_many(slots)
        return self._found

    def _rows_of_many(self, slots: int) -> Rows:
        packed = np.frombuffer(slots.to_bytes(-(-slots.bit_length() // 8), "little"), np.uint8)
        return self._row_of[np.flatnonzero(np.unpackbits(packed, bitorder="little"))]

    def least_assigned(self, rows: Rows, logs: Floats, now: float, half_life: float) -> list[tuple[float, int]]:
        """The rows among these that may have the least assigned work, with it. The `logs` of these rows
        (`Work.assigned_log`) order them but for rounding, and work assigned so long ago that nothing is left of it."""
        least, faded = float(logs.min()), now / half_life - 1000.0
        bound = max(least + 1e-9 + 1e-14 * abs(least), faded) if math.isfinite(least) else faded
        return [(self.workers[row].work.assigned(now), row) for row in rows[logs <= bound].tolist()]

    def row_of(self, url: str) -> int:
        """The row of the worker at this URL; -1 if there is none."""
        worker = self._fleet.get(url)
        return worker.work.row if worker is not None else -1

    def _rebuild(self) -> None:
        self.members = self._changes.members
        self.workers = list(self._fleet.values())
        self.columns = np.zeros((len(Standing._fields), len(self.workers)))
        self.column = dict(zip(Standing._fields, self.columns, strict=True))
        self.column["room"].fill(np.inf)
        self._until = 0.0
        self.foreign.clear()
        self.silent.clear()
        self.kinds = []
        self.kind = np.zeros(len(self.workers), np.intp)
        self._row_of = np.zeros(1 + max((worker.view.slot for worker in self.workers), default=0), np.intp)
        self._sought, self._found = 0, np.empty(0, np.intp)
        for works in (self._changes.works, self._taken, self._unseen):
            works.clear()
        self.slots = 0
        for row, worker in enumerate(self.workers):
            self.slots |= worker.bit
            worker.work.row = row
            self._row_of[worker.view.slot] = row
            self._changes.works.add(worker.work)
            self.kind[row] = self._kind_of(worker.work.block_size, worker.work.groups)

    def _kind_of(self, block_size: int, groups: tuple[CacheGroup, ...]) -> int:
        kind = block_size, groups
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)
