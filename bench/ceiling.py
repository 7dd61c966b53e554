"""The pooled ceiling: the hit rate of one cache as large as all workers' caches together.

No router can beat it by much: it is what the prompts share, cut only by the memory there is. One prefix cache in LRU
order, with the engines' own rules: a hit is the longest run of cached blocks that leaves the last token to compute
(vLLM rule 8), blocks are there from the moment they are scheduled (rule 6), and the tail of a prompt goes before its
head (rule 10). Blocks that generated tokens would fill are left out, in the ceiling's favour.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from bench.prompts import Prompt
from kvcache.keys import BlockKey, PrefixKeys, pack_tokens


class PooledCache:
    """An LRU prefix cache of `capacity` blocks. O(1) a block."""

    __slots__ = ("_blocks", "_capacity")

    def __init__(self, capacity: int) -> None:
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()
        self._capacity = capacity

    def admit(self, keys: Sequence[BlockKey], reusable: int) -> int:
        """Blocks of a prompt found, at most `reusable`; afterwards all its blocks are held, most recent first."""
        blocks = self._blocks
        found = 0
        while found < reusable and keys[found] in blocks:
            found += 1
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        while len(blocks) > self._capacity:
            blocks.popitem(last=False)
        return found

    def held(self) -> frozenset[BlockKey]:
        """The blocks in the cache now."""
        return frozenset(self._blocks)


def pooled_hit_rate(prompts: Iterable[Prompt], capacity: int, block_size: int) -> float:
    """Cached over all prompt tokens when the prompts come one after the other; `capacity` in blocks."""
    cache = PooledCache(capacity)
    hits = total = 0
    for prompt in prompts:
        keys = PrefixKeys(pack_tokens(prompt.tokens), block_size, prompt.scope).all()
        hits += cache.admit(keys, (len(prompt.tokens) - 1) // block_size) * block_size
        total += len(prompt.tokens)
    return hits / total if total else 0.0
