"""The KV-cache groups of layers with a sliding window, beside the group of full attention.

As in vLLM 0.32 (`v1/core/single_type_kv_cache_manager.py:SlidingWindowManager`, `v1/core/kv_cache_coordinator.py:
HybridKVCacheCoordinator`; compared with these classes on random caches), all groups take their blocks from one pool:

- A sequence has a block for the same tokens in each group. It gives back the blocks of a sliding group that lie wholly
  before the window of the next token to be computed, at the beginning of the step after the one that computed beyond
  them. They stay cached until they are evicted.
- A prefix of n blocks can be reused if the full group holds them all and each sliding group the last ceil((w - 1) /
  block size) of them, or all if there are fewer. The longest such prefix is.
- A request is admitted if its blocks fit; of a sliding group no more are counted than the window and the tokens of one
  step can take.

Not modelled: groups with different block sizes or windows, sparse retention (`prefix_cache_retention_interval`),
speculative decoding, which needs one block more, and the step in flight that vLLM's asynchronous scheduling counts, so
that it gives a block back one step later.
"""

from __future__ import annotations

from itertools import islice

from kvcache.keys import BlockKey
from worker.emulator.engine.block_pool import BlockPool, group_key
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.events import BlocksStored
from worker.emulator.engine.sequence import Sequence


class SlidingGroups:
    """Groups 1 to `config.sliding_groups`, which all have the window `config.sliding_window`."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._pool = pool
        self._size = config.block_size
        self._window = config.sliding_window
        self._numbers = range(1, config.sliding_groups + 1)
        self._needed = -(-(config.sliding_window - 1) // config.block_size)
        """Blocks before its end that a prefix needs."""
        self._most = config.sliding_blocks_per_request
        self._step = -(-config.max_num_batched_tokens // config.block_size)
        self._of: dict[str, tuple[int, list[list[int]]]] = {}
        """By request: the index of its first block that it has not given back, and the blocks of each group from there
        on."""

    def hits(self, sequence: Sequence, limit: int) -> int:
        """The longest prefix of the sequence, up to `limit` blocks, that the groups can serve."""
        keys, cached = sequence.content.keys(limit), self._pool.cached
        held, end = 0, limit
        for at in range(limit - 1, -1, -1):
            if held >= self._needed:
                break
            if all(group_key(keys[at], number) in cached for number in self._numbers):
                held += 1
            else:
                held, end = 0, at
        return end

    def missing(self, sequence: Sequence, hits: int) -> int:
        """Free blocks that the groups need so that the sequence can be admitted with `hits` cached blocks."""
        window = self._cached_window(sequence, hits)
        free = sum(len(blocks) - self._pool.in_use(blocks) for blocks in window)
        total = -(-sequence.tokens // self._size)
        new = min(total - hits, max(self._most - hits, self._step))
        return len(self._numbers) * new + free

    def admit(self, sequence: Sequence, hits: int) -> None:
        """The sequence uses the blocks of the window before its first `hits` blocks' end."""
        blocks = self._cached_window(sequence, hits)
        for group in blocks:
            self._pool.acquire(group)
        self._of[sequence.request.request_id] = (self._skipped(hits * self._size), blocks)

    def extend(self, sequence: Sequence, count: int) -> None:
        """Take `count` blocks of each group. Raises `OutOfBlocksError`."""
        _, groups = self._of[sequence.request.request_id]
        for blocks in groups:
            blocks += self._pool.allocate(count)

    def slide(self, sequence: Sequence) -> None:
        """Give back the blocks before the window of the next token."""
        first, groups = self._of[sequence.request.request_id]
        skipped = min(self._skipped(sequence.computed), first + len(groups[0]))
        if skipped > first:
            for blocks in groups:
                self._pool.release(blocks[: skipped - first])
                del blocks[: skipped - first]
            self._of[sequence.request.request_id] = (skipped, groups)

    def store(self, sequence: Sequence, first: int, end: int) -> None:
        """Make the blocks of these indices, which are full, available for hits."""
        begun, groups = self._of[sequence.request.request_id]
        content = sequence.content
        keys = content.keys(end)
        parent = keys[first - 1] if first else None
        for number, blocks in zip(self._numbers, groups, strict=True):
            stored = BlocksStored(tuple(islice(keys, first, end)), parent, content, first, group=number)
            self._pool.store(blocks[first - begun : end - begun], stored)

    def release(self, sequence: Sequence) -> None:
        """The sequence uses no blocks any more."""
        _, groups = self._of.pop(sequence.request.request_id, (0, []))
        for blocks in groups:
            self._pool.release(blocks)

    def held(self) -> dict[int, list[BlockKey]]:
        """The cached keys of each group. A key that k blocks hold is listed k times."""
        return {number: self._pool.keys_of_group(number) for number in self._numbers}

    def _skipped(self, computed: int) -> int:
        """Blocks wholly before the window of the token after `computed` ones."""
        return max(0, computed - self._window + 1) // self._size

    def _cached_window(self, sequence: Sequence, hits: int) -> list[list[int]]:
        keys = sequence.content.keys(hits)[self._skipped(hits * self._size) : hits]
        return [self._pool.hits(group_key(key, number) for key in keys) for number in self._numbers]
