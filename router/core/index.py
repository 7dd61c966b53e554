"""Which workers hold which blocks.

Shape: `masks` maps a block key to a bitmask of worker slots, and each slot has a dictionary of key -> number of
physical blocks (`counts`). Because a key names a whole prefix (`kvcache.keys`), the map is the trie: no node has
children, and the depth of a match is found by probing depths, not by walking.

Invariants of each layer (`_Layer`): bit s of `masks[k]` is set exactly when `counts[s][k] >= 1`; no mask is 0 and no
count is 0.

Rejected: a set of keys per slot instead of counts, because an engine can hold the same key in several physical blocks
(vLLM rule 9) and remove them one by one; and a tree of nodes, because every lookup would visit every depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kvcache.keys import BlockKey, PrefixKeys


class Assumption:
    """Blocks of a dispatched request, assumed present on its worker until the feed confirms them."""

    __slots__ = ("_generation", "_keys", "_slot")

    def __init__(self, slot: int, generation: int, keys: Sequence[BlockKey]) -> None:
        self._slot = slot
        self._generation = generation
        self._keys = keys


class _Layer:
    """The keys of every slot with their counts, and `sizes`, the sum of each slot's counts."""

    __slots__ = ("counts", "masks", "sizes")

    def __init__(self) -> None:
        self.masks: dict[BlockKey, int] = {}
        self.counts: list[dict[BlockKey, int]] = []
        self.sizes: list[int] = []

    def grow(self) -> None:
        """Add a slot."""
        self.counts.append({})
        self.sizes.append(0)

    def add(self, slot: int, keys: Sequence[BlockKey]) -> None:
        counts, masks, bit = self.counts[slot], self.masks, 1 << slot
        self.sizes[slot] += len(keys)
        for key in keys:
            count = counts.get(key, 0)
            counts[key] = count + 1
            if not count:
                masks[key] = masks.get(key, 0) | bit

    def discard(self, slot: int, keys: Sequence[BlockKey]) -> int:
        """Remove one of each key. Returns how many of them were not there."""
        counts, missing = self.counts[slot], 0
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


class PrefixIndex:
    """The blocks of every worker, and a second layer of blocks that are assumed present for a short while.

    Slots are small integers that `open` hands out and that are used again after `drop`. Storing or removing a block is
    O(1); `clear`, `drop` and `replace` are O(blocks of that slot); `depths` is O(slots x log depth) lookups and
    hashes only the depths it probes.
    """

    __slots__ = ("_assumed", "_free", "_generations", "_stored")

    def __init__(self) -> None:
        self._stored = _Layer()
        self._assumed = _Layer()
        self._free: list[int] = []
        self._generations: list[int] = []

    # --- slots ------------------------------------------------------------------------------------------

    def open(self) -> int:
        """An empty slot for one more worker: the lowest that is free, so that masks stay narrow."""
        if self._free:
            slot = min(self._free)
            self._free.remove(slot)
            return slot
        self._stored.grow()
        self._assumed.grow()
        self._generations.append(0)
        return len(self._generations) - 1

    def drop(self, slot: int) -> None:
        """Forget a worker that left; its slot is free for another one."""
        self.clear(slot)
        self._free.append(slot)

    # --- what workers state -----------------------------------------------------------------------------

    def store(self, slot: int, keys: Sequence[BlockKey]) -> None:
        """The worker holds one more physical block of each key."""
        self._stored.add(slot, keys)

    def remove(self, slot: int, keys: Sequence[BlockKey]) -> int:
        """The worker holds one physical block less of each key. Returns how many it did not hold: 0 while the feed is
        in order."""
        return self._stored.discard(slot, keys)

    def clear(self, slot: int) -> None:
        """The worker's cache is empty, and assumptions about it are void."""
        self._stored.replace(slot, ())
        self._assumed.replace(slot, ())
        self._generations[slot] += 1

    def replace(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The worker holds exactly these blocks (each key once per physical block); assumptions stay."""
        self._stored.replace(slot, keys)

    def held(self, slot: int) -> Counter[BlockKey]:
        """A copy of the multiset of keys that this slot holds."""
        return Counter(self._stored.counts[slot])

    def blocks(self, slot: int) -> int:
        """Physical blocks of this slot."""
        return self._stored.sizes[slot]

    def __len__(self) -> int:
        """Distinct keys that any worker states that it holds."""
        return len(self._stored.masks)

    # --- what is assumed --------------------------------------------------------------------------------

    def assume(self, slot: int, keys: Sequence[BlockKey]) -> Assumption:
        """Count these blocks as present until `withdraw`, or until the slot is cleared or dropped."""
        self._assumed.add(slot, keys)
        return Assumption(slot, self._generations[slot], keys)

    def withdraw(self, assumption: Assumption) -> None:
        """End an assumption; this does nothing if it has ended already."""
        keys, assumption._keys = assumption._keys, ()
        if assumption._generation == self._generations[assumption._slot]:
            self._assumed.discard(assumption._slot, keys)

    def assumed_blocks(self) -> int:
        """Distinct keys that are assumed on any worker."""
        return len(self._assumed.masks)

    # --- search -----------------------------------------------------------------------------------------

    def depths(self, keys: PrefixKeys, among: int, limit: int) -> dict[int, int]:
        """How many leading blocks of the prompt, up to `limit`, each slot of the bitmask `among` holds; slots that hold
        none are left out.

        Caches are prefix-closed: a worker that holds depth d holds every depth below. So one search over depths serves
        all workers and splits where they differ.
        """
        stored, assumed, key = self._stored.masks.get, self._assumed.masks.get, keys.key
        found: dict[int, int] = {}
        below, at, alive = 0, 1, among
        split: list[tuple[int, int, int]] = []  # (depth they hold, depth they do not, slots)
        while alive and below < limit:
            at = min(at, limit)
            probe = key(at)
            have = (stored(probe, 0) | assumed(probe, 0)) & alive
            if alive != have:
                split.append((below, at, alive & ~have))
            below, at, alive = at, at * 2, have
        if alive and below:
            _settle(found, alive, below)
        while split:
            low, high, slots = split.pop()
            if high - low == 1:
                if low:
                    _settle(found, slots, low)
                continue
            middle = (low + high) // 2
            probe = key(middle)
            have = (stored(probe, 0) | assumed(probe, 0)) & slots
            if slots != have:
                split.append((low, middle, slots & ~have))
            if have:
                split.append((middle, high, have))
        return found

    def stated_depth(self, keys: PrefixKeys, slot: int, limit: int) -> int:
        """How many leading blocks of the prompt, up to `limit`, the worker itself states that it holds."""
        counts = self._stored.counts[slot]
        low, high = 0, limit + 1
        probe = limit  # the usual answer is all of it
        while high - low > 1:
            if keys.key(probe) in counts:
                low = probe
            else:
                high = probe
            probe = (low + high) // 2
        return low


def _settle(found: dict[int, int], slots: int, depth: int) -> None:
    for slot in bits(slots):
        found[slot] = depth


def bits(mask: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
