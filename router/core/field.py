"""What one request would cost on each worker of a large fleet: `Worker.candidate` and `Work.expect` for all at once.

Every figure is computed by the same operations in the same order as there, so it is the same to the last bit; tests
compare the two on random fleets. Each is computed when it is first asked for, because no strategy needs all of them.

Workers with equal caches (size of a block, groups) that hold equally much of the prompt have its blocks in common:
these are counted once, by the functions that `Work.expect` uses too, and then distributed to the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from kvcache.profiles import blocks_to_compute
from router.core.latency_correction import CLEAR, EVIDENCE
from router.core.standing import Standing
from router.core.table import Floats, Rows, Table
from router.core.work import LEFT, STALL_TOKENS, Learnt, blocks_taken

if TYPE_CHECKING:
    from kvcache.feed import CacheGroup
    from router.core.config import FleetConfig
    from router.core.decision import Candidate
    from router.core.matches import Matches
    from router.core.shape import Shape

Figure: TypeAlias = Floats | float
"""One for each row, or the same one for all of them."""

_LOGS, _MASSES = (
    slice(Standing._fields.index(f"prefill_{figure}"), Standing._fields.index(f"decode_{figure}") + 1)
    for figure in ("log", "mass")
)
"""The rows of the factors' columns: those of prefills and of decoding."""


class Question(NamedTuple):
    """A request, as far as its cost depends on it: the arguments of `Worker.candidate`."""

    shape: Shape
    matches: Matches
    best: int
    charge: float
    streaming: bool
    now: float


class _Blocks(NamedTuple):
    """What a worker of some kind that holds some depth of the prompt would do."""

    unloaded: float
    """Seconds of prefill, uncorrected."""
    rest: float
    """The same if it had what the best worker has."""
    new: int
    """Blocks that the request takes."""


class Field:
    """The figures of all rows of a table, under the names that they have in `Candidate`; whether a worker may take the
    request at all does not matter here. They are valid until the table is refreshed."""

    def __init__(self, table: Table, config: FleetConfig, learnt: Learnt, question: Question) -> None:
        self._table = table
        self._config = config
        self._latency = config.latency
        self._learnt = learnt
        self._question = question
        self._loading: dict[int, Candidate] = {}
        """By row: those that would load blocks from slower tiers. There are few, and they are computed one by one."""
        for slot in question.matches.loads:
            (row,) = table.rows_of(1 << slot)
            self._loading[row] = table.workers[row].candidate(*question)

    # --- figures of candidates --------------------------------------------------------------------------

    @cached_property
    def matched_blocks(self) -> Figure:
        depths, _, combined = self._depths
        if combined is None:
            return self._with_loads(float(depths[0]), "matched_blocks")
        kinds = len(self._table.kinds)
        found = np.array(depths, float).take(combined if kinds == 1 else combined // kinds)
        return self._with_loads(found, "matched_blocks")

    @property
    def queue_seconds(self) -> Figure:
        return self._with_loads(self._waiting + self._half_step + self.memory_seconds, "queue_seconds")

    @cached_property
    def memory_seconds(self) -> Figure:
        if max(blocks.new for blocks in self._depths[1]) <= self._column("room").min():
            return self._with_loads(0.0, "memory_seconds")
        active, used, capacity = self._active, self._column("used"), self._column("capacity")
        waits = self._learnt.decode_time.seconds * (active - capacity) / np.maximum(used, 1.0) * self._decode_factor
        return self._with_loads(np.where((active > capacity) & (used > 0.0), waits, 0.0), "memory_seconds")

    @property
    def prefill_seconds(self) -> Figure:
        return self._with_loads(self._prefill, "prefill_seconds")

    @property
    def active_blocks(self) -> Figure:
        return self._with_loads(self._active, "active_blocks")

    @property
    def in_flight(self) -> Floats:
        return self._column("others")

    @property
    def turn(self) -> Floats:
        return self._column("turn")

    @property
    def cost(self) -> Floats:
        shape, best, charge, streaming = (
            self._question.shape, self._question.best, self._question.charge, self._question.streaming,
        )  # fmt: skip
        prefill = self._prefill
        cost = self._waiting + self._half_step
        if isinstance(memory := self.memory_seconds, np.ndarray):
            cost += memory
        cost += prefill
        cost += self._slowdown
        if charge and best:
            rest = self._distributed(lambda blocks: blocks.rest)
            repeated = prefill - np.maximum(rest * self._prefill_factor, self._step)
            cost += charge * np.where(self.matched_blocks < best, repeated, 0.0)
        if not streaming:
            cost += shape.output * self._alone + prefill * self.in_flight
        return np.asarray(self._with_loads(cost, "cost"))

    def assigned_seconds(self, rows: Rows) -> list[tuple[float, int]]:
        """The rows among these that may have the least assigned work, with it."""
        return self._table.least_assigned(
            rows, self._column("assigned")[rows], self._question.now, self._config.assigned_half_life
        )

    # --- what they consist of ---------------------------------------------------------------------------

    def _column(self, name: str) -> Floats:
        return self._table.column[name]

    def _with_loads(self, figures: Figure, name: str) -> Figure:
        """The figures, with those of the workers that would load blocks."""
        if self._loading:
            figures = np.array(np.broadcast_to(figures, len(self._table.workers)), float)
            for row, candidate in self._loading.items():
                figures[row] = getattr(candidate, name)
        return figures

    @cached_property
    def _factors(self) -> list[Figure]:
        """`WorkerFactor.factor` of prefills and of decoding: those of the fleet, but for the workers that may differ
        clearly."""
        correction, columns = self._learnt.correction, self._table.columns
        fleet = correction.prefill, correction.decode
        if correction.even:
            return [fleet[0].factor, fleet[1].factor]
        apart = np.abs(columns[_LOGS] - np.array([[fleet[0].log], [fleet[1].log]]))  # and less so with time
        different = apart >= CLEAR
        if not different.any():
            return [fleet[0].factor, fleet[1].factor]
        different &= columns[_MASSES] * apart >= EVIDENCE * CLEAR
        return [self._factor(fleet[kind].factor, kind, np.flatnonzero(different[kind])) for kind in (0, 1)]

    def _factor(self, fleet: float, kind: int, different: Rows) -> Figure:
        """The factors of one kind; those of the rows that may be `different` are looked up one by one."""
        if not different.size:
            return fleet
        workers, factors = self._table.workers, np.full(len(self._table.workers), fleet)
        for row in different.tolist():
            correction = workers[row].work.correction
            factors[row] = (correction.prefill, correction.decode)[kind].factor(self._question.now)
        return factors

    @property
    def _prefill_factor(self) -> Figure:
        return self._factors[0]

    @property
    def _decode_factor(self) -> Figure:
        return self._factors[1]

    @property
    def _waiting(self) -> Floats:
        """`Work._waiting`."""
        now, seconds = self._question.now, self._column("seconds")
        elapsed = now - self._column("began")
        progress = np.minimum(elapsed, self._column("at_once"))
        waiting = seconds - progress
        elapsed -= progress
        waiting += elapsed
        waiting *= self._column("pending")
        if self._table.foreign:
            waiting += np.maximum(self._column("foreign_seconds") - (now - self._column("reported_at")), 0.0)
        if self._table.silent:
            waiting += np.maximum(now - self._column("late_from"), 0.0)
        return waiting

    @cached_property
    def _step(self) -> Floats:
        """`Work._step_in_progress`."""
        return self._column("step") * self._decode_factor

    @property
    def _half_step(self) -> Floats:
        return 0.5 * self._step

    @cached_property
    def _prefill(self) -> Figure:
        return np.maximum(self._distributed(lambda blocks: blocks.unloaded) * self._prefill_factor, self._step)

    @property
    def _context(self) -> int:
        shape = self._question.shape
        return shape.prompt_tokens + int(shape.output) // 2

    @cached_property
    def _alone(self) -> Figure:
        """Seconds of a step that decodes this request alone."""
        return self._latency.decode_step(1, self._context) * self._decode_factor

    @cached_property
    def _active(self) -> Floats:
        return self._column("used") + self._distributed(lambda blocks: blocks.new)

    @property
    def _slowdown(self) -> Figure:
        """A worker without requests has none: all that it is multiplied with is 0."""
        output, latency = self._question.shape.output, self._latency
        if not output:
            return 0.0
        others, left, share = self.in_flight, self._column("left"), self._column("token_share")
        if self._table.foreign:
            mean = self._learnt.lengths.mean
            left = np.where(np.isnan(left), LEFT * mean, left)
            share = share + self._column("foreign") / max(mean, 1.0)
        mine = latency.decode_sequence + latency.decode_token * self._context
        longer = mine * others
        longer += self._column("theirs")
        slowdown: Floats = np.minimum(output, left)
        slowdown *= longer
        slowdown *= self._decode_factor
        pause = np.maximum(self._step, self._alone)
        np.subtract(self._prefill, pause, out=pause)
        np.maximum(pause, 0.0, out=pause)
        pause *= STALL_TOKENS
        pause *= share
        slowdown += pause
        return slowdown

    def row_of(self, url: str) -> int:
        """The row of the worker at this URL; -1 if it has none."""
        return self._table.row_of(url)

    def _distributed(self, figure: Callable[[_Blocks], float]) -> Figure:
        """For each row the figure that follows from its kind and the depth that it holds."""
        _, pairs, found = self._depths
        if found is None:
            return figure(pairs[0])
        return np.array([figure(pair) for pair in pairs], float).take(found)

    def _blocks(self, depth: int, size: int, groups: tuple[CacheGroup, ...]) -> _Blocks:
        shape, latency, unit = self._question.shape, self._latency, self._config.block_size
        cached, best = depth * unit, self._question.best * unit
        return _Blocks(
            latency.prefill(blocks_to_compute(shape.prompt_tokens, cached, size, latency.block_size)),
            latency.prefill(blocks_to_compute(shape.prompt_tokens, best, size, latency.block_size)),
            blocks_taken(shape, cached, 0, size, groups),
        )

    @cached_property
    def _depths(self) -> tuple[list[int], list[_Blocks], Rows | None]:
        """The different depths of the prompt that workers hold, what follows for each pair of a depth and a kind, and
        the pair of each row, as a position among all pairs; None: there is one only."""
        kinds, runs = self._table.kinds, self._question.matches.runs
        if len(kinds) == len(runs) == 1 and runs[0].slots == self._table.slots:
            depth = runs[0].depth  # all hold the beginning that all prompts share
            return [depth], [self._blocks(depth, *kinds[0])], None
        depths = [0, *dict.fromkeys(depth for _, depth in runs)]
        pairs = [self._blocks(depth, *kind) for depth in depths for kind in kinds]
        if len(pairs) == 1:
            return depths, pairs, None
        position = {depth: index for index, depth in enumerate(depths)}
        found = self._table.kind.copy()
        for slots, depth in runs:
            found[self._table.rows_of(slots)] += position[depth] * len(kinds)
        return depths, pairs, found
