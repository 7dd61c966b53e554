"""Decides which sequences the next step computes, and how long that takes (vLLM rules 12-14).

Continuous batching with chunked prefill: running sequences come first, in the order of their admission, then waiting
ones, first come first served. The cost is O(1) for each scheduled sequence and block. Only the lookup of a waiting
request is O(prompt), and it is repeated only when its outcome may have changed.

With a CPU tier (`offload.CpuTier`), a request whose prefix goes on there loads those blocks first, as vLLM does
asynchronously: it holds the blocks for them, computes nothing and does not keep later requests from being admitted.
When the load has ended, it goes before the requests that wait. A request that would load blocks that another one is
loading waits for that load, and then hits them on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

from kvcache.profiles import LatencyModel, blocks_to_compute
from worker.emulator.engine.block_pool import BlockPool
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.events import BlocksStored
from worker.emulator.engine.offload import CpuTier
from worker.emulator.engine.request import EngineStats
from worker.emulator.engine.sequence import Sequence, SequenceEvent, SequenceState
from worker.emulator.engine.sliding import SlidingGroups
from worker.emulator.engine.waiting import WaitingSequences

_PREFILLING, _FINISHED = SequenceState.PREFILLING, SequenceState.FINISHED
_LOADING, _LOADED = SequenceState.LOADING, SequenceState.LOADED
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


class _Admission(Enum):
    """What an attempt to admit a waiting sequence led to."""

    ADMITTED = auto()
    NO_ROOM = auto()
    """There are too few free blocks. Later sequences have to wait, too."""
    BLOCKED = auto()
    """It waits for a load, its own or that of another request. Later sequences may go first."""


class Scheduler:
    """Holds the running and the waiting sequences of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        latency: LatencyModel,
        cache: BlockPool,
        stats: EngineStats,
        tier: CpuTier | None = None,
        sliding: SlidingGroups | None = None,
    ) -> None:
        self._config = config
        self._latency = latency
        self._cache = cache
        self._tier = tier
        self._sliding = sliding
        self._groups = 1 + config.sliding_groups
        """KV-cache groups: each has blocks for the same tokens."""
        self._stats = stats
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.waiting = WaitingSequences(config.max_loras)
        self._offering: list[Sequence] = []
        """Sequences whose prompts got blocks in the step in progress."""
        self._failed_admission: _FailedAdmission | None = None

    def change_latency(self, latency: LatencyModel) -> None:
        """See `Engine.change_latency`."""
        self._latency = latency

    def remove(self, sequence: Sequence) -> None:
        """Remove an aborted sequence, running or waiting, and release its blocks: O(running). The blocks of a load are
        released when it ends."""
        if not self.waiting.remove(sequence):
            self.running.remove(sequence)
        if sequence.state is not _LOADING:
            self.free(sequence)

    def sweep(self) -> None:
        """Remove finished sequences from the running ones."""
        self.running = [sequence for sequence in self.running if sequence.state is not _FINISHED]

    def free(self, sequence: Sequence) -> None:
        """Release the sequence's blocks."""
        self._cache.release(sequence.blocks)
        sequence.blocks = []
        if self._sliding is not None:
            self._sliding.release(sequence)

    def step_ended(self) -> None:
        """The blocks that the step computed exist now, and are copied to the CPU tier."""
        if self._tier is None or not self._offering:
            return
        for sequence in self._offering:
            end = min(sequence.computed, sequence.prompt_tokens) // self._block_size
            if end > sequence.offered:
                sequence.used_to = max(sequence.used_to, end)
                if self._tier.offer(sequence.content, sequence.offered, end):
                    sequence.offered = end
        self._offering = []

    def sequence_ended(self, sequence: Sequence) -> None:
        """The sequence has finished, or was aborted."""
        if self._tier is not None:
            keys = sequence.content.keys(sequence.used_to)
            self._tier.touch(keys[sequence.used_from : sequence.used_to])

    def schedule(self, start: float) -> Step | None:
        """The step that begins at `start`. None: every sequence waits for a load."""
        if self._tier is not None:
            self._take_loads(self._tier, start)
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
            if self._sliding is not None:
                self._sliding.slide(sequence)
            prefills = sequence.state is prefilling
            if prefills:
                count = min(sequence.tokens - sequence.computed, budget)
                needed = -(-(sequence.computed + count) // self._block_size) - len(sequence.blocks)
            else:
                count = sequence.tokens - sequence.computed  # 1, or 0 if its source was not ready
                needed = 1 if count and sequence.computed % self._block_size == 0 else 0
            if needed:
                if needed * self._groups > self._cache.free:
                    preempted = True
                    if not self._make_room(sequence, needed * self._groups):
                        break
                self._extend(sequence, needed)
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
        for sequence in () if preempted else self.waiting.candidates(running):
            if not budget or len(running) >= self._config.max_num_seqs:
                break
            admission = self._admit(sequence, start)
            if admission is _Admission.NO_ROOM:
                break  # the head of the queue blocks the others
            if admission is _Admission.BLOCKED:
                continue
            count = min(sequence.tokens - sequence.computed, budget)
            needed = -(-(sequence.computed + count) // self._block_size) - len(sequence.blocks)
            self._extend(sequence, needed)
            prefill_seconds += self._compute_chunk(sequence, count)
            if sequence.computed == sequence.tokens:
                sampling.append(sequence)
            budget -= count
        if budget == limit and not running and not preempted:
            return None
        seconds = prefill_seconds
        if decoding:
            seconds = max(seconds, self._latency.decode_step(decoding, context))
        return Step(start, start + seconds, sampling, limit - budget)

    def _extend(self, sequence: Sequence, count: int) -> None:
        """Take `count` blocks of each group for the sequence."""
        sequence.blocks += self._cache.allocate(count)
        if self._sliding is not None:
            self._sliding.extend(sequence, count)

    def prefill_tokens(self) -> int:
        """Prompt tokens that remain to be computed: those of running sequences, and those that waiting sequences would
        need if they were admitted now without loading blocks. O(running + waiting), plus O(1) for each block by which
        the hits of waiting sequences have changed since the last call."""
        tokens, prefilling = 0, _PREFILLING
        for sequence in self.running:
            if sequence.state is prefilling:
                tokens += sequence.tokens - sequence.computed
        if not len(self.waiting):
            return tokens
        tokens += sum(sequence.tokens - sequence.computed for sequence in self.waiting.blocked)
        cached, size = self._cache.cached, self._block_size
        for sequence in self.waiting.queued:
            if self._looks_up(sequence):
                end = (sequence.tokens - 1) // size
                hits = sequence.known_hits
                keys = sequence.content.keys(min(hits + 1, end))
                while hits and keys[hits - 1] not in cached:
                    hits -= 1
                while hits < end and sequence.content.keys(hits + 1)[hits] in cached:
                    hits += 1
                sequence.known_hits = hits
            hits = sequence.known_hits
            if hits and self._sliding is not None:
                hits = self._sliding.hits(sequence, hits)
            tokens += sequence.tokens - hits * size
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
            self.waiting.enqueue_first(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence, start: float) -> _Admission:
        """Admit a sequence with the blocks of its cached prefix, unless there are too few free blocks for all of its
        known tokens (rule 13), or begin to load blocks for it."""
        size, cache = self._block_size, self._cache
        if sequence.state is _LOADED:
            if -(-sequence.tokens // size) - len(sequence.blocks) > cache.free:
                return _Admission.NO_ROOM
        else:
            if not self._may_fit(sequence):
                return _Admission.NO_ROOM
            looks_up = self._looks_up(sequence)
            hits = cache.hits(sequence.content.each_key((sequence.tokens - 1) // size)) if looks_up else []
            if hits and self._sliding is not None:
                del hits[self._sliding.hits(sequence, len(hits)) :]
            if looks_up and self._tier is not None:
                outcome = self._load(self._tier, sequence, hits, start)
                if outcome is not None:
                    return outcome
            missing = -(-sequence.tokens // size) - cache.in_use(hits) - cache.free
            if self._sliding is not None:
                missing += self._sliding.missing(sequence, len(hits))
            if missing > 0:
                self._failed_admission = _FailedAdmission(sequence, len(hits), missing, cache.freed)
                return _Admission.NO_ROOM
            self._failed_admission = None
            cache.acquire(hits)
            if self._sliding is not None:
                self._sliding.admit(sequence, len(hits))
            sequence.blocks = hits
            sequence.computed = len(hits) * size
            sequence.stored = 0
            self._note_hits(sequence, len(hits), 0)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.advance(SequenceEvent.ADMITTED)
        if blocks_to_compute(sequence.tokens, sequence.computed, size):
            sequence.admission_cost = self._latency.prefill_base
            sequence.block_cost = self._latency.prefill_block
        else:
            sequence.admission_cost = self._latency.prefill_cached
            sequence.block_cost = 0.0
        if sequence.scheduled is None:
            sequence.scheduled = start
        return _Admission.ADMITTED

    def _note_hits(self, sequence: Sequence, hits: int, loads: int) -> None:
        """Count the blocks that a sequence finds on the GPU and in the CPU tier, at its first lookup that leads to
        anything (rule 16)."""
        if sequence.scheduled is not None:
            return
        size, stats = self._block_size, self._stats
        sequence.cached_tokens = (hits + loads) * size
        sequence.loaded_tokens = loads * size
        if self._looks_up(sequence):
            stats.prefix_cache_queries += sequence.tokens
            stats.prefix_cache_hits += hits * size
            if self._tier is not None:
                stats.external_cache_queries += sequence.tokens - hits * size
                stats.external_cache_hits += loads * size

    def _load(self, tier: CpuTier, sequence: Sequence, hits: list[int], start: float) -> _Admission | None:
        """Begin to load the blocks after `hits` that the tier holds. None: it holds none. A load may end with the last
        token of the prompt, which is then computed again."""
        size, cache, content = self._block_size, self._cache, sequence.content
        first, end = len(hits), sequence.tokens // size
        if first >= end or content.keys(first + 1)[first] not in tier.cached:
            return None
        keys = tier.hits(islice(content.each_key(end), first, None))
        blocks = -(-sequence.tokens // size)
        if tier.loading(keys):
            self.waiting.block(sequence)
            return _Admission.BLOCKED
        if blocks - cache.in_use(hits) + self._reserved() > cache.free:
            return _Admission.NO_ROOM
        self.waiting.block(sequence)
        cache.acquire(hits)
        sequence.blocks = hits + cache.allocate(len(keys))
        sequence.computed = len(sequence.blocks) * size
        end = first + len(keys)
        sequence.offered, sequence.used_from = max(sequence.offered, end), first
        sequence.used_to = max(sequence.used_to, end)
        self._note_hits(sequence, first, len(keys))
        sequence.advance(SequenceEvent.LOAD_BEGAN)
        self._stats.load_seconds += tier.load(sequence, first, keys, start)
        self._stats.loaded_blocks += len(keys)
        return _Admission.BLOCKED

    def _reserved(self) -> int:
        """Blocks that sequences which load, or are not prefilled yet, still need. A load is not preempted, so it must
        not take them."""
        return sum(
            -(-sequence.tokens // self._block_size) - len(sequence.blocks)
            for sequence in (*self.waiting.blocked, *self.running)
            if sequence.state in (_LOADING, _LOADED, _PREFILLING)
        )

    def _take_loads(self, tier: CpuTier, now: float) -> None:
        """Make the blocks whose loads have ended available for hits."""
        for load in tier.arrived(now):
            sequence = load.sequence
            if sequence.state is _FINISHED:  # aborted
                self.free(sequence)
                continue
            sequence.advance(SequenceEvent.LOAD_ENDED)
            self._store(sequence, load.first)
            sequence.stored = len(sequence.blocks)
            if sequence.computed == sequence.tokens:
                sequence.computed -= 1  # the last token is computed again

    def _looks_up(self, sequence: Sequence) -> bool:
        """Whether the sequence may use cached blocks."""
        return self._caching and sequence.request.read_cache

    def _may_fit(self, sequence: Sequence) -> bool:
        """False if another lookup of this sequence would fail as the last one did.

        Admission needs `blocks - hits in use <= free`. The difference shrinks only when blocks are freed or when the
        number of hits changes: a hit that comes into use leaves the free blocks. Hits change at the end of the prefix.
        With a CPU tier or sliding windows, each step looks the sequence up again.
        """
        failed = self._failed_admission
        if failed is None or failed.sequence is not sequence or self._tier is not None or self._sliding is not None:
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
        if end // size > max(begin // size, sequence.stored):
            self._store(sequence, max(begin // size, sequence.stored))
        if self._tier is not None:
            self._offering.append(sequence)
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
        if self._sliding is not None:
            self._sliding.store(sequence, first, end)
