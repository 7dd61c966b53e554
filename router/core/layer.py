"""One layer of the index: the blocks of every worker in one tier and group.

Invariants: bit s of `masks[k]` is set exactly when `held[s]` has k, and no mask is 0. A key of `more[s]` is in
`held[s]`, and no number there is 0.

An engine can hold the same key in several physical blocks (vLLM rule 9) and remove them one by one, but rarely does. So
only what is held beyond the first block is counted, and whole runs of keys enter and leave a set at a time: each key is
looked up once in the set of its slot and once in the masks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat

from kvcache.keys import KEY_BYTES, BlockKey

_KEY_SIZE = sys.getsizeof(bytes(KEY_BYTES))
_CACHED_INTS = 8
"""Masks of so few slots are numbers that the interpreter keeps anyway."""


class Layer:
    """The keys of every slot, how many more blocks than one each has, and `sizes`, the number of each slot's blocks."""

    __slots__ = ("_bits", "held", "masks", "more", "sizes")

    def __init__(self, slots: int = 0) -> None:
        self.masks: dict[BlockKey, int] = {}
        self._bits: list[int] = [1 << slot for slot in range(slots)]
        """The mask of each slot alone: one object for all keys that only this slot has."""
        self.held: list[set[BlockKey]] = [set() for _ in range(slots)]
        self.more: list[dict[BlockKey, int]] = [{} for _ in range(slots)]
        self.sizes: list[int] = [0] * slots

    def grow(self) -> None:
        """Add a slot."""
        self._bits.append(1 << len(self._bits))
        self.held.append(set())
        self.more.append({})
        self.sizes.append(0)

    def add(self, slot: int, keys: Sequence[BlockKey]) -> None:
        """Add one of each key."""
        held = self.held[slot]
        self.sizes[slot] += len(keys)
        if held.isdisjoint(keys):
            before = len(held)
            held.update(keys)
            if len(held) - before != len(keys):
                self.more[slot].update((key, count - 1) for key, count in Counter(keys).items() if count > 1)
            self._mark(slot, keys)
            return
        more, new = self.more[slot], []
        for key in keys:
            if key in held:
                more[key] = more.get(key, 0) + 1
            else:
                held.add(key)
                new.append(key)
        self._mark(slot, new)

    def discard(self, slot: int, keys: Sequence[BlockKey]) -> int:
        """Remove one of each key. Returns how many of them were not there."""
        held, more = self.held[slot], self.more[slot]
        last = keys
        if more and not more.keys().isdisjoint(keys):
            last = [key for key in keys if not _take(more, key)]
        before = len(held)
        held.difference_update(last)
        missing = len(last) - (before - len(held))
        self._unmark(slot, last)
        self.sizes[slot] -= len(keys) - missing
        return missing

    def forget(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """Remove each key, however many blocks hold it."""
        held, more = self.held[slot], self.more[slot]
        gone = held.intersection(keys)
        held -= gone
        self.sizes[slot] -= len(gone) + sum(more.pop(key, 0) for key in gone)
        self._unmark(slot, gone)

    def replace(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The slot has exactly these blocks, with as many of each key as are listed."""
        counts = Counter(keys)
        old, new = self.held[slot], set(counts)
        self.held[slot] = new
        self.more[slot] = {key: count - 1 for key, count in counts.items() if count > 1}
        self.sizes[slot] = counts.total()
        self._unmark(slot, old - new)
        self._mark(slot, new - old)

    def counts(self, slot: int) -> Counter[BlockKey]:
        """How many blocks of the slot hold each key: O(blocks)."""
        counts = Counter(self.held[slot])
        counts.update(self.more[slot])
        return counts

    def _mark(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The slot has these keys now."""
        masks, bit = self.masks, self._bits[slot]
        before = list(map(masks.setdefault, keys, repeat(bit)))
        if before.count(bit) != len(before):
            for key, mask in zip(keys, before, strict=True):
                if mask != bit:
                    masks[key] = mask | bit

    def _unmark(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The slot has none of these keys any more."""
        masks, bit = self.masks, self._bits[slot]
        before = list(map(masks.pop, keys, repeat(0)))
        if before.count(bit) != len(before):
            for key, mask in zip(keys, before, strict=True):
                if rest := mask & ~bit:
                    masks[key] = rest

    def memory(self) -> int:
        """Bytes, as the interpreter allocates them: all tables, a key for each entry of a slot (each feed brings keys
        of its own; a mask's is that of one of its slots), and the masks of more than 8 slots. O(slots)."""
        keys = sum(map(len, self.held)) * _KEY_SIZE
        tables = sys.getsizeof(self.masks) + sum(map(sys.getsizeof, self.held)) + sum(map(sys.getsizeof, self.more))
        wide = sys.getsizeof(1 << len(self.held)) if len(self.held) > _CACHED_INTS else 0
        return keys + tables + wide * len(self.masks)


def _take(counts: dict[BlockKey, int], key: BlockKey) -> bool:
    """Count one less of the key. False: none was counted."""
    count = counts.get(key, 0)
    if count > 1:
        counts[key] = count - 1
    elif count:
        del counts[key]
    return count > 0
