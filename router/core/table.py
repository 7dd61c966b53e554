"""The standings of all workers in columns, so that a decision computes with all of them at once.

Each worker has a row, in the order in which the workers joined. Rows are written anew only for workers that have
changed (`Changes`), or whose standing ends by itself.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcache.feed import CacheGroup
from router.core.index import bits
from router.core.standing import NEVER, Changes, Standing
from router.core.worker import Worker

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.intp]

_NO_LOGS = (math.inf, -math.inf), (math.inf, -math.inf)
FEW = 8
"""The rows of so many slots or fewer are looked up one by one."""
TIGHTEN = 256
"""So many refreshes apart, `Table.own_logs` is computed anew."""
_UNTIL, _LATE, _FOREIGN_SECONDS, _FOREIGN, _PREFILL_LOG, _DECODE_LOG = map(
    Standing._fields.index, ("until", "late_from", "foreign_seconds", "foreign", "prefill_log", "decode_log")
)


class Table:
    """`columns[i]` has field i of `Standing` for each row. `refresh` is O(changed workers) and a few vector operations;
    O(workers) after one has joined or left."""

    def __init__(self, workers: Mapping[str, Worker], changes: Changes) -> None:
        self._fleet = workers
        self._changes = changes
        self._members = -1
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
        self.own_logs = _NO_LOGS
        """Bounds of the workers' own factors, of prefills and of decoding: all logarithms lie between them."""
        self._refreshes = 0
        self._until = NEVER
        """When the first standing ends by itself, or earlier."""
        self._row_of: Rows = np.empty(0, np.intp)
        """By slot."""
        self._sought, self._found = 0, np.empty(0, np.intp)
        """What `rows_of` was last asked for, and its answer: many prompts begin alike."""

    def refresh(self, now: float, among: Container[Worker]) -> None:
        """Bring the rows of the workers `among` up to date."""
        if self._members != self._changes.members:
            self._rebuild()
        changed, workers = self._changes.works, self.workers
        rows = [work.row for work in changed]
        if self._until <= now:
            rows += np.flatnonzero(self.columns[_UNTIL] <= now).tolist()
        rows = [row for row in set(rows) if workers[row] in among]
        if not rows:
            return
        standings = []
        foreign, silent = self.foreign, self.silent
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
            self.kind[row] = self._kind_of(work.block_size, work.groups)
            changed.discard(work)
        self.columns[:, rows] = np.array(standings).T
        self._note(standings, now)

    def _note(self, standings: Sequence[tuple[float, ...]], now: float) -> None:
        """Widen the bounds by these standings, which have been written; now and then, and after standings have ended
        by themselves, compute them anew."""
        self._refreshes += 1
        if self._until <= now or self._refreshes % TIGHTEN == 0:
            self._until = float(self.columns[_UNTIL].min())
            logs = self.columns[[_PREFILL_LOG, _DECODE_LOG]]
            least, most = np.fmin.reduce(logs, 1, initial=np.inf), np.fmax.reduce(logs, 1, initial=-np.inf)
            self.own_logs = (float(least[0]), float(most[0])), (float(least[1]), float(most[1]))
            return
        (least_prefill, most_prefill), (least_decode, most_decode) = self.own_logs
        for standing in standings:
            # Those that are not told yet are NaN, which compares as neither.
            prefill, decode, until = standing[_PREFILL_LOG], standing[_DECODE_LOG], standing[_UNTIL]
            if prefill < least_prefill:
                least_prefill = prefill
            if prefill > most_prefill:
                most_prefill = prefill
            if decode < least_decode:
                least_decode = decode
            if decode > most_decode:
                most_decode = decode
            if until < self._until:
                self._until = until
        self.own_logs = (least_prefill, most_prefill), (least_decode, most_decode)

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

    def row_of(self, url: str) -> int:
        """The row of the worker at this URL; -1 if there is none."""
        worker = self._fleet.get(url)
        return worker.work.row if worker is not None else -1

    def _rebuild(self) -> None:
        self._members = self._changes.members
        self.workers = list(self._fleet.values())
        self.columns = np.zeros((len(Standing._fields), len(self.workers)))
        self.column = dict(zip(Standing._fields, self.columns, strict=True))
        self.column["room"].fill(np.inf)
        self.own_logs = _NO_LOGS
        self._until = 0.0
        self.foreign.clear()
        self.silent.clear()
        self.kinds = []
        self.kind = np.zeros(len(self.workers), np.intp)
        self._row_of = np.zeros(1 + max((worker.view.slot for worker in self.workers), default=0), np.intp)
        self._sought, self._found = 0, np.empty(0, np.intp)
        self._changes.works.clear()
        self.slots = 0
        for row, worker in enumerate(self.workers):
            self.slots |= worker.bit
            worker.work.row = row
            self._row_of[worker.view.slot] = row
            self._changes.works.add(worker.work)

    def _kind_of(self, block_size: int, groups: tuple[CacheGroup, ...]) -> int:
        kind = block_size, groups
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)
