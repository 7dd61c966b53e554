"""Which sequences the next step computes, and how long it takes (vLLM rules 12-14).

Continuous batching with chunked prefill: running sequences first, in the order of their admission, then waiting ones
first come first served. Costs are O(1) a scheduled sequence and a block; nothing here is O(prompt) a step, except a
waiting request's lookup, which is repeated only when its outcome may have changed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvcache.profiles import LatencyModel, blocks_to_compute
from worker.emulator.engine.block_pool import BlockPool
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.request import EngineStats
from worker.emulator.engine.sequence import Sequence, SequenceEvent, SequenceState

_PREFILLING, _FINISHED = SequenceState.PREFILLING, SequenceState.FINISHED
"""Reading an enum's attributes anew in every step would cost a step of one sequence 3 %."""


@dataclass(slots=True)
class Step:
    """One forward pass."""

    start: float
    end: float
    sampling: list[Sequence]
    """Sequences that get a token at its end."""
    tokens: int
    """Tokens it computes."""


@dataclass(slots=True)
class _FailedAdmission:
    """Why the head of the waiting queue could not be admitted when it was last looked up."""

    sequence: Sequence
    hits: int
    missing: int
    """Blocks that it lacked."""
    freed: int
    """`BlockPool.freed` at that moment."""


class Scheduler:
    """Holds the running and the waiting sequences of one engine."""

    def __init__(self, config: EngineConfig, latency: LatencyModel, cache: BlockPool, stats: EngineStats) -> None:
        self._config = config
        self._latency = latency
        self._cache = cache
        self._stats = stats
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        """By request id; the next one to admit first."""
        self._failed_admission: _FailedAdmission | None = None

    def enqueue(self, sequence: Sequence) -> None:
        """Last in the queue."""
        self.waiting[sequence.request.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """An aborted sequence, wherever it is, leaves and gives its blocks back: O(running)."""
        if self.waiting.pop(sequence.request.request_id, None) is None:
            self.running.remove(sequence)
            self.free(sequence)

    def sweep(self) -> None:
        """Take the sequences that are done out of the running ones."""
        self.running = [sequence for sequence in self.running if sequence.state is not _FINISHED]

    def free(self, sequence: Sequence) -> None:
        """Give the sequence's blocks back to the cache."""
        self._cache.release(sequence.blocks)
        sequence.blocks = []

    def schedule(self, start: float) -> Step:
        """The step that begins at `start`. Something must be running or waiting."""
        budget = limit = self._config.max_num_batched_tokens
        sampling: list[Sequence] = []
        prefill_seconds = 0.0
        decoding = False
        preempted = False
        running = self.running
        at = 0
        while at < len(running) and budget:
            sequence = running[at]
            at += 1
            if sequence.state is _PREFILLING:
                count = min(sequence.tokens - sequence.computed, budget)
                needed = -(-(sequence.computed + count) // self._block_size) - len(sequence.blocks)
            else:
                count = sequence.tokens - sequence.computed  # 1, or 0 when its source was not ready
                needed = 1 if count and sequence.computed % self._block_size == 0 else 0
            if needed:
                if needed > self._cache.free:
                    preempted = True
                    if not self._make_room(sequence, needed):
                        break
                sequence.blocks += self._cache.allocate(needed)
            if sequence.state is _PREFILLING:
                prefill_seconds += self._compute_chunk(sequence, count)
            else:
                decoding = True
                if count:
                    sequence.computed += 1
                    if sequence.computed % self._block_size == 0:
                        self._store(sequence, sequence.computed // self._block_size - 1)
            if sequence.computed == sequence.tokens:
                sampling.append(sequence)
            budget -= count or 1
        while self.waiting and not preempted and budget and len(running) < self._config.max_num_seqs:
            admitted = self._admit(start)
            if admitted is None:
                break  # the head of the queue blocks those behind it
            count = min(admitted.tokens - admitted.computed, budget)
            needed = -(-(admitted.computed + count) // self._block_size) - len(admitted.blocks)
            admitted.blocks += self._cache.allocate(needed)
            prefill_seconds += self._compute_chunk(admitted, count)
            if admitted.computed == admitted.tokens:
                sampling.append(admitted)
            budget -= count
        seconds = max(prefill_seconds, self._latency.decode) if decoding else prefill_seconds
        return Step(start, start + seconds, sampling, limit - budget)

    def prefill_tokens(self) -> int:
        """Prompt tokens still to be computed: what running sequences lack, and what waiting ones would lack if they
        were admitted now. O(running + waiting), and O(1) a block by which those hits have changed since last time."""
        tokens = sum(sequence.tokens - sequence.computed for sequence in self.running if sequence.state is _PREFILLING)
        cached, size = self._cache.cached, self._block_size
        for sequence in self.waiting.values():
            if self._looks_up(sequence):
                end = (sequence.tokens - 1) // size
                hits = sequence.known_hits
                keys = sequence.keys(min(hits + 1, end))
                while hits and keys[hits - 1] not in cached:
                    hits -= 1
                while hits < end and sequence.keys(hits + 1)[hits] in cached:
                    hits += 1
                sequence.known_hits = hits
            tokens += sequence.tokens - sequence.known_hits * size
        return tokens

    def _make_room(self, sequence: Sequence, needed: int) -> bool:
        """Preempt from the end of the running sequences until `needed` blocks are free. False when `sequence` itself
        had to go: nothing that came later runs either."""
        while self._cache.free < needed:
            victim = self.running.pop()
            self.free(victim)
            victim.computed = 0
            victim.on(SequenceEvent.PREEMPTED)
            victim.preemptions += 1
            self._stats.preemptions += 1
            self.enqueue(victim)
            self.waiting.move_to_end(victim.request.request_id, last=False)
            if victim is sequence:
                return False
        return True

    def _admit(self, start: float) -> Sequence | None:
        """Move the head of the waiting queue to the running sequences, with the blocks it finds cached; None when the
        blocks for all of its known tokens are not to be had (rule 13)."""
        sequence = next(iter(self.waiting.values()))
        if not self._may_fit(sequence):
            return None
        size, cache = self._block_size, self._cache
        hits = cache.hits(sequence.each_key((sequence.tokens - 1) // size)) if self._looks_up(sequence) else []
        missing = -(-sequence.tokens // size) - cache.in_use(hits) - cache.free
        if missing > 0:
            self._failed_admission = _FailedAdmission(sequence, len(hits), missing, cache.freed)
            return None
        self._failed_admission = None
        del self.waiting[sequence.request.request_id]
        self.running.append(sequence)
        sequence.on(SequenceEvent.ADMITTED)
        cache.acquire(hits)
        sequence.blocks = hits
        sequence.computed = cached = len(hits) * size
        if blocks_to_compute(sequence.tokens, cached, size):
            sequence.admission_cost = self._latency.prefill_base
            sequence.block_cost = self._latency.prefill_block
        else:
            sequence.admission_cost = self._latency.prefill_cached
            sequence.block_cost = 0.0
        if sequence.scheduled is None:
            sequence.scheduled = start
            sequence.cached_tokens = cached
            if self._looks_up(sequence):
                self._stats.prefix_cache_queries += sequence.tokens
                self._stats.prefix_cache_hits += cached
        return sequence

    def _looks_up(self, sequence: Sequence) -> bool:
        """Whether the sequence takes from the cache what it finds there."""
        return self._caching and sequence.request.read_cache

    def _may_fit(self, sequence: Sequence) -> bool:
        """False when a lookup would come to the same result as the last one, which blocked this sequence.

        Admission needs `blocks - hits in use <= free`. That gap narrows only when blocks are freed or when hits
        change; in between, each block that joins the hits in use leaves the free ones. Hits change at their end.
        """
        blocked = self._failed_admission
        if blocked is None or blocked.sequence is not sequence:
            return True
        if self._cache.freed - blocked.freed >= blocked.missing:
            return True
        if not self._looks_up(sequence):
            return False
        cached, hits = self._cache.cached, blocked.hits
        if hits and sequence.keys(hits)[hits - 1] not in cached:
            return True
        return hits < (sequence.tokens - 1) // self._block_size and sequence.keys(hits + 1)[hits] in cached

    def _compute_chunk(self, sequence: Sequence, count: int) -> float:
        """Prefill the next `count` tokens; their full blocks can be hit at once (rule 6). Seconds it takes."""
        size = self._block_size
        begin = sequence.computed
        end = begin + count
        sequence.computed = end
        if end // size > begin // size:
            self._store(sequence, begin // size)
        if end == sequence.tokens:
            sequence.on(SequenceEvent.PREFILLED)
        seconds = sequence.admission_cost + sequence.block_cost * (-(-end // size) - -(-begin // size))
        sequence.admission_cost = 0.0
        return seconds

    def _store(self, sequence: Sequence, first: int) -> None:
        """The sequence's blocks from index `first` on that are full now can be hit from now on."""
        if not self._caching:
            return
        end = sequence.computed // self._block_size
        keys = sequence.keys(end)
        self._cache.store(sequence.blocks[first:end], keys[first:end], keys[first - 1] if first else None)
