"""Makes decisions: finds what the candidates hold of a prompt, what the request would cost on each, and chooses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.core.catalogue import Candidates
from router.core.config import FleetConfig
from router.core.decision import Candidate, Decision, DecisionReason, RouteRequest
from router.core.field import Field, Question
from router.core.idle import IdleWorkers
from router.core.index import PrefixIndex
from router.core.matches import NO_MATCHES, find_matches, reported_blocks
from router.core.reuse import PrefixPopularity
from router.core.selection import SELECTIONS, cache_aware
from router.core.sessions import SessionTable
from router.core.shape import shape_of
from router.core.standing import Changes
from router.core.strategies import Conditions, find_strategy, reason
from router.core.table import Table
from router.core.work import Learnt
from router.core.worker import Worker

TIE_SECONDS = 1e-4
"""Costs that differ by this and half a decode step are equal: the end of that step is not known more precisely."""
MANY = 24
"""From so many candidates on, computing with all of them at once (`Field`) takes less time than one after the other."""

TIGHTEN = 256
"""After so many decisions among many, or as many as there are workers, bounds that only widen are computed anew."""


class Chooser:
    """The decisions of one fleet. `choose` changes nothing but the samples of answers that the time has completed."""

    def __init__(
        self,
        config: FleetConfig,
        workers: Mapping[str, Worker],
        index: PrefixIndex,
        popularity: PrefixPopularity,
        sessions: SessionTable,
        learnt: Learnt,
        changes: Changes,
        many: int = MANY,
    ) -> None:
        self._config = config
        self._strategy = find_strategy(config.strategy)
        self._select = SELECTIONS.get(self._strategy)
        self._workers = workers
        self._index = index
        self._popularity = popularity
        self._sessions = sessions
        self._learnt = learnt
        self._changes = changes
        self._many = many
        self._table = Table(workers, changes)
        self._idle = IdleWorkers(self._table, config, learnt, changes)
        self._among_many = 0
        """Decisions for which the costs on all workers were computed at once, or not at all."""
        self._usable = UsableViews(config.view_timeout, workers, changes)
        self._block_seconds = config.latency.prefill_block * config.block_size / config.latency.block_size
        """Seconds of computing one block."""
        self._tie = TIE_SECONDS + config.latency.decode / 2

    def choose(
        self,
        request: RouteRequest,
        candidates: Candidates,
        now: float,
        lap: Callable[[], None] | None,
        *,
        explain: bool,
    ) -> Decision:
        """Where this request should go: see `Fleet.choose`."""
        self._changes.take_samples(now)
        shape = shape_of(request, self._config.block_size, self._learnt.lengths)
        among, keys = 0, request.keys
        if shape.reusable_blocks or (shape.loadable_blocks and self._index.has_slower_tiers):
            among = candidates.slots & self._usable.slots(now)
        matches = NO_MATCHES
        if among and keys is not None:
            matches = find_matches(self._index, keys, among, shape.reusable_blocks, shape.loadable_blocks)
        best, charge = matches.best(), 0.0
        if best and keys is not None:
            charge = self._popularity.charge(keys.key(best), matches.holders(best), len(candidates.workers))
        if lap is not None:
            lap()
        question = Question(shape, matches, best, charge, request.streaming, now)
        chosen, figures = self._choice(request, question, candidates, matchable=among != 0, explain=explain)
        if request.stored is not None:
            why = DecisionReason.STORED_RESPONSE
        elif len(candidates.workers) == 1:
            why = DecisionReason.ONLY_CANDIDATE
        else:
            why = reason(self._strategy, chosen.matched_blocks, best, matchable=among != 0)
        return Decision(
            worker_id=chosen.worker_id,
            url=chosen.url,
            strategy=self._config.strategy,
            reason=why,
            matched_blocks=chosen.matched_blocks,
            loaded_blocks=chosen.loaded_blocks,
            prompt_blocks=shape.prompt_blocks,
            predicted_ttft=chosen.queue_seconds + chosen.load_seconds + chosen.prefill_seconds,
            queue_seconds=chosen.queue_seconds,
            prefill_seconds=chosen.prefill_seconds,
            candidates=figures,
            best_blocks=best,
            reported_blocks=self._reported_blocks(request, chosen, now),
            rank=self._workers[chosen.url].named_rank,
        )

    def _choice(
        self, request: RouteRequest, question: Question, candidates: Candidates, *, matchable: bool, explain: bool
    ) -> tuple[Candidate, tuple[Candidate, ...]]:
        """The chosen candidate, and those whose figures were computed."""
        session, workers, now = request.session, candidates.workers, question.now
        conditions = Conditions(
            matchable,
            self._tie,
            self._sessions.find(session, now) if session is not None else None,
            session is not None and session.hint,
            self._block_seconds,
            question.charge < 0.0,
        )
        if explain or len(workers) < self._many or self._select is None:
            figures = tuple(worker.candidate(*question) for worker in workers)
            chosen = figures[0] if len(figures) == 1 else self._strategy(figures, conditions)
            return chosen, figures
        table = self._table
        self._among_many += 1
        if self._among_many % max(TIGHTEN, len(workers)) == 0:
            self._idle.tighten()
            self._learnt.correction.narrow([worker.work.correction for worker in self._workers.values()])
        row = self._idle.choose(question, candidates, conditions) if self._select is cache_aware else None
        if row is None:
            table.refresh(now, candidates.members)
            row = self._select(Field(table, self._config, self._learnt, question), candidates.rows, conditions)
        chosen = table.workers[row].candidate(*question)
        return chosen, (chosen,)

    def _reported_blocks(self, request: RouteRequest, chosen: Candidate, now: float) -> int:
        if request.reported is None:
            return chosen.matched_blocks
        view = self._workers[chosen.url].view
        return reported_blocks(self._index, request.reported, view.slot, usable=view.usable(now))


class UsableViews:
    """The slots of the workers whose views may be used: O(workers) after one has changed other than by being confirmed,
    or when one may have become too old, which is no more often than once in `timeout`; otherwise O(1)."""

    def __init__(self, timeout: float, workers: Mapping[str, Worker], changes: Changes) -> None:
        self._timeout = timeout
        self._workers = workers
        self._changes = changes
        self._noted = (-1, -1)
        self._confirmed_at = 0.0
        """No usable view was confirmed before."""
        self._slots = 0

    def slots(self, now: float) -> int:
        """A bitmask."""
        noted = self._changes.members, self._changes.views
        if self._noted != noted or now - self._confirmed_at > self._timeout:
            self._noted, self._slots, self._confirmed_at = noted, 0, now
            for worker in self._workers.values():
                if worker.view.usable(now):
                    self._slots |= worker.bit
                    if worker.view.confirmed_at is not None:
                        self._confirmed_at = min(self._confirmed_at, worker.view.confirmed_at)
        return self._slots
