"""Decides which sequences the next step computes, and how long that takes (vLLM rules 12-14).

Continuous batching with chunked prefill: running sequences come first, in the order of their admission, then waiting
ones, first come first served. The cost is O(1) for each scheduled sequence and block. Only the lookup of a waiting
request is O(prompt), and it is repeated only when its outcome may have changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from kvcache.profiles import LatencyModel, blocks_to_compute
from worker.emulator.engine.block_pool import BlockPool
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.events import BlocksStored
from worker.emulator.engine.request import EngineStats
from worker.emulator.engine.sequence import Sequence, SequenceEvent, SequenceState

_PREFILLING, _FINISHED = SequenceState.PREFILLING, SequenceState.FINISHED
"""Read once: an attribute of an enum is slow enough to show in a step of one sequence (3 % each)."""


@dataclass(slots=True)
class Step:
    """One forward pass, with its start and end in seconds."""

    start: float
    end: float
    sampling: list[Sequence]
    """The sequences that get a token at the end of the step."""
    tokens: int
    """The number of tokens that the step computes."""


@dataclass(slots=True)
class _FailedAdmission:
    """Why the head of the waiting queue could not be admitted at its last lookup."""

    sequence: Sequence
    hits: int
    missing: int
    """The number of blocks that were missing."""
    freed: int
    """`BlockPool.freed` at that time."""


class Scheduler:
    """Holds the running and the waiting sequences of one engine."""

    def __init__(self, config: EngineConfig, latency: LatencyModel, cache: BlockPool, stats: EngineStats) -> None:
        self._config = config
        self._latency = latency
        self._cache = cache
        self._stats = stats
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._max_loras = config.max_loras
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        """By request id, in the order of admission."""
        self.deferred: set[str] = set()
        """Ids of waiting sequences that were passed over because `max_loras` other adapters ran."""
        self._failed_admission: _FailedAdmission | None = None

    def enqueue(self, sequence: Sequence) -> None:
        """Append to the waiting queue."""
        self.waiting[sequence.request.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove an aborted sequence, running or waiting, and release its blocks: O(running)."""
        self.deferred.discard(sequence.request.request_id)
        if self.waiting.pop(sequence.request.request_id, None) is None:
            self.running.remove(sequence)
            self.free(sequence)

    def sweep(self) -> None:
        """Remove finished sequences from the running ones."""
        self.running = [sequence for sequence in self.running if sequence.state is not _FINISHED]

    def free(self, sequence: Sequence) -> None:
        """Release the sequence's blocks."""
        self._cache.release(sequence.blocks)
        sequence.blocks = []

    def schedule(self, start: float) -> Step:
        """The step that begins at `start`. At least one sequence must be running or waiting."""
        budget = limit = self._config.max_num_batched_tokens
        sampling: list[Sequence] = []
        prefill_seconds = 0.0
        decoding = context = 0
        preempted = False
        running, prefilling = self.running, _PREFILLING
        at = 0
        while at < len(running) and budget:
            sequence = running[at]
            at += 1
            prefills = sequence.state is prefilling
            if prefills:
                count = min(sequence.tokens - sequence.computed, budget)
                needed = -(-(sequence.computed + count) // self._block_size) - len(sequence.blocks)
            else:
                count = sequence.tokens - sequence.computed  # 1, or 0 if its source was not ready
                needed = 1 if count and sequence.computed % self._block_size == 0 else 0
            if needed:
                if needed > self._cache.free:
                    preempted = True
                    if not self._make_room(sequence, needed):
                        break
                sequence.blocks += self._cache.allocate(needed)
            if prefills:
                prefill_seconds += self._compute_chunk(sequence, count)
            else:
                decoding += 1
                if count:
                    sequence.computed += 1
                    if sequence.computed % self._block_size == 0:
                        self._store(sequence, sequence.computed // self._block_size - 1)
                context += sequence.computed
            if sequence.computed == sequence.tokens:
                sampling.append(sequence)
            budget -= count or 1
        adapters = _adapters(running) if self._max_loras else set()
        while self.waiting and not preempted and budget and len(running) < self._config.max_num_seqs:
            head = self._head(adapters) if self._max_loras else next(iter(self.waiting.values()))
            admitted = head and self._admit(head, start)
            if admitted is None:
                break  # the head of the queue blocks the others
            count = min(admitted.tokens - admitted.computed, budget)
            needed = -(-(admitted.computed + count) // self._block_size) - len(admitted.blocks)
            admitted.blocks += self._cache.allocate(needed)
            prefill_seconds += self._compute_chunk(admitted, count)
            if admitted.computed == admitted.tokens:
                sampling.append(admitted)
            budget -= count
        seconds = prefill_seconds
        if decoding:
            seconds = max(seconds, self._latency.decode_step(decoding, context))
        return Step(start, start + seconds, sampling, limit - budget)

    def prefill_tokens(self) -> int:
        """Prompt tokens that remain to be computed: those of running sequences, and those that waiting sequences would
        need if they were admitted now. O(running + waiting), plus O(1) for each block by which the hits of waiting
        sequences have changed since the last call."""
        tokens = sum(sequence.tokens - sequence.computed for sequence in self.running if sequence.state is _PREFILLING)
        cached, size = self._cache.cached, self._block_size
        for sequence in self.waiting.values():
            if self._looks_up(sequence):
                end = (sequence.tokens - 1) // size
                hits = sequence.known_hits
                keys = sequence.content.keys(min(hits + 1, end))
                while hits and keys[hits - 1] not in cached:
                    hits -= 1
                while hits < end and sequence.content.keys(hits + 1)[hits] in cached:
                    hits += 1
                sequence.known_hits = hits
            tokens += sequence.tokens - sequence.known_hits * size
        return tokens

    def _make_room(self, sequence: Sequence, needed: int) -> bool:
        """Preempt running sequences, the last one first, until `needed` blocks are free. False if `sequence` itself was
        preempted; then no later sequence runs, either."""
        while self._cache.free < needed:
            victim = self.running.pop()
            self.free(victim)
            victim.computed = 0
            victim.advance(SequenceEvent.PREEMPTED)
            victim.preemptions += 1
            self._stats.preemptions += 1
            self.enqueue(victim)
            self.waiting.move_to_end(victim.request.request_id, last=False)
            if victim is sequence:
                return False
        return True

    def _head(self, adapters: set[str]) -> Sequence | None:
        """The first waiting sequence that may run beside these adapters, with its own added to them. Others are passed
        over: they do not block the queue (vLLM: `max_loras`)."""
        full = len(adapters) >= self._max_loras
        for sequence in self.waiting.values():
            adapter = sequence.request.scope.adapter
            if not adapter or adapter in adapters or not full:
                if adapter:
                    adapters.add(adapter)
                return sequence
            self.deferred.add(sequence.request.request_id)
        return None

    def _admit(self, sequence: Sequence, start: float) -> Sequence | None:
        """Admit a waiting sequence with the blocks of its cached prefix. None if there are too few free blocks for all
        of its known tokens (rule 13)."""
        if not self._may_fit(sequence):
            return None
        size, cache = self._block_size, self._cache
        hits = cache.hits(sequence.content.each_key((sequence.tokens - 1) // size)) if self._looks_up(sequence) else []
        missing = -(-sequence.tokens // size) - cache.in_use(hits) - cache.free
        if missing > 0:
            self._failed_admission = _FailedAdmission(sequence, len(hits), missing, cache.freed)
            return None
        self._failed_admission = None
        del self.waiting[sequence.request.request_id]
        self.deferred.discard(sequence.request.request_id)
        self.running.append(sequence)
        sequence.advance(SequenceEvent.ADMITTED)
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
        """Whether the sequence may use cached blocks."""
        return self._caching and sequence.request.read_cache

    def _may_fit(self, sequence: Sequence) -> bool:
        """False if another lookup of this sequence would fail as the last one did.

        Admission needs `blocks - hits in use <= free`. The difference shrinks only when blocks are freed or when the
        number of hits changes: a hit that comes into use leaves the free blocks. Hits change at the end of the prefix.
        """
        failed = self._failed_admission
        if failed is None or failed.sequence is not sequence:
            return True
        if self._cache.freed - failed.freed >= failed.missing:
            return True
        if not self._looks_up(sequence):
            return False
        cached, hits = self._cache.cached, failed.hits
        if hits and sequence.content.keys(hits)[hits - 1] not in cached:
            return True
        return hits < (sequence.tokens - 1) // self._block_size and sequence.content.keys(hits + 1)[hits] in cached

    def _compute_chunk(self, sequence: Sequence, count: int) -> float:
        """Prefill the next `count` tokens, whose full blocks can be hit at once (rule 6). Returns the seconds it
        takes."""
        size, unit = self._block_size, self._latency.block_size
        begin = sequence.computed
        end = begin + count
        sequence.computed = end
        if end // size > begin // size:
            self._store(sequence, begin // size)
        if end == sequence.tokens:
            sequence.advance(SequenceEvent.PREFILLED)
        seconds = sequence.admission_cost + sequence.block_cost * (-(-end // unit) - -(-begin // unit))
        sequence.admission_cost = 0.0
        return seconds

    def _store(self, sequence: Sequence, first: int) -> None:
        """Make the sequence's full blocks from index `first` on available for hits."""
        if not self._caching:
            return
        end = sequence.computed // self._block_size
        content = sequence.content
        keys = content.keys(end)
        parent = keys[first - 1] if first else None
        self._cache.store(sequence.blocks[first:end], BlocksStored(tuple(keys[first:end]), parent, content, first))


def _adapters(sequences: Iterable[Sequence]) -> set[str]:
    """The adapters that these sequences use."""
    return {adapter for sequence in sequences if (adapter := sequence.request.scope.adapter)}
