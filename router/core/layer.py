"""One layer of the index: the blocks of every worker in one tier and group.

Invariants: bit s of `masks[k]` is set exactly when `counts[s][k] >= 1`; no mask is 0 and no count is 0.

Rejected: a set of keys per slot instead of counts, because an engine can hold the same key in several physical blocks
(vLLM rule 9) and remove them one by one.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import repeat

from kvcache.keys import KEY_BYTES, BlockKey

_KEY_SIZE = sys.getsizeof(bytes(KEY_BYTES))
_CACHED_INTS = 8
"""Masks of so few slots are numbers that the interpreter keeps anyway."""


class Layer:
    """The keys of every slot with their counts, and `sizes`, the sum of each slot's counts."""

    __slots__ = ("counts", "masks", "sizes")

    def __init__(self, slots: int = 0) -> None:
        self.masks: dict[BlockKey, int] = {}
        self.counts: list[dict[BlockKey, int]] = [{} for _ in range(slots)]
        self.sizes: list[int] = [0] * slots

    def grow(self) -> None:
        """Add a slot."""
        self.counts.append({})
        self.sizes.append(0)

    def add(self, slot: int, keys: Sequence[BlockKey]) -> None:
        """Add one of each key. Keys that are all new, as those of a prompt's tail are, take no loop."""
        counts, masks, bit = self.counts[slot], self.masks, 1 << slot
        self.sizes[slot] += len(keys)
        new = keys
        if counts.keys().isdisjoint(keys) and len(added := dict.fromkeys(keys, 1)) == len(keys):
            counts.update(added)
        else:
            new = []
            for key in keys:
                count = counts.get(key, 0)
                counts[key] = count + 1
                if not count:
                    new.append(key)
        if masks.keys().isdisjoint(new):
            masks.update(dict.fromkeys(new, bit))
        else:
            for key in new:
                masks[key] = masks.get(key, 0) | bit

    def discard(self, slot: int, keys: Sequence[BlockKey]) -> int:
        """Remove one of each key. Returns how many of them were not there. Keys of which there is one each, as is
        usual, take no loop unless other slots hold them."""
        counts, masks, bit = self.counts[slot], self.masks, 1 << slot
        if list(map(counts.get, keys)).count(1) == len(keys):
            before = len(counts)
            deque(map(counts.pop, keys, repeat(0)), maxlen=0)
            missing = len(keys) - (before - len(counts))  # a key that is listed twice
            held = list(map(masks.pop, keys, repeat(0)))
            if held.count(bit) != len(keys):
                for key, mask in zip(keys, held, strict=True):
                    if rest := mask & ~bit:
                        masks[key] = rest
        else:
            missing = 0
            for key in keys:
                count = counts.get(key, 0)
                if count > 1:
                    counts[key] = count - 1
                elif count:
                    del counts[key]
                    self._unmark(slot, key)
                else:
                    missing += 1
        self.sizes[slot] -= len(keys) - missing
        return missing

    def forget(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """Remove each key, whatever its count."""
        counts = self.counts[slot]
        for key in keys:
            if count := counts.pop(key, 0):
                self.sizes[slot] -= count
                self._unmark(slot, key)

    def replace(self, slot: int, keys: Iterable[BlockKey]) -> None:
        old, new = self.counts[slot], dict(Counter(keys))
        self.counts[slot] = new
        self.sizes[slot] = sum(new.values())
        masks, bit = self.masks, 1 << slot
        for key in old.keys() - new.keys():
            self._unmark(slot, key)
        for key in new.keys() - old.keys():
            masks[key] = masks.get(key, 0) | bit

    def _unmark(self, slot: int, key: BlockKey) -> None:
        rest = self.masks[key] & ~(1 << slot)
        if rest:
            self.masks[key] = rest
        else:
            del self.masks[key]

    def memory(self) -> int:
        """Bytes, as the interpreter allocates them: the tables of all dictionaries, a key for each entry of a slot
        (each feed brings keys of its own; a mask's is that of one of its slots), and the masks of more than 8 slots.
        O(slots)."""
        keys = sum(map(len, self.counts)) * _KEY_SIZE
        tables = sys.getsizeof(self.masks) + sum(map(sys.getsizeof, self.counts))
        wide = sys.getsizeof(1 << len(self.counts)) if len(self.counts) > _CACHED_INTS else 0
        return keys + tables + wide * len(self.masks)
