"""Which workers hold which blocks.

Shape: `_holders` maps a block key to a bitmask of worker slots, and each slot has a dictionary of key -> number
of physical blocks. Because a key names a whole prefix (`kvcache.keys`), the map is the trie: no node has
children, and the depth of a match is found by probing depths, not by walking.

Invariants: bit s of `_holders[k]` is set exactly when `_counts[s][k] >= 1`; no mask is 0 and no count is 0. The
assumed layer (below) keeps the same two invariants by itself.

A set of keys a slot instead of counts was rejected: an engine can hold the same key in several physical blocks
(vLLM rule 9) and remove them one by one. A tree of nodes was rejected: every lookup would visit every depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kvcache.keys import BlockKey, PrefixKeys


class Assumption:
    """Blocks of a dispatched request, taken as present on its worker until the feed confirms them."""

    __slots__ = ("_keys", "_life", "_slot")

    def __init__(self, slot: int, life: int, keys: Sequence[BlockKey]) -> None:
        self._slot = slot
        self._life = life
        self._keys = keys


class _Layer:
    """Counted keys of every slot, and `sizes`, the sum of each slot's counts."""

    __slots__ = ("counts", "masks", "sizes")

    def __init__(self) -> None:
        self.masks: dict[BlockKey, int] = {}
        self.counts: list[dict[BlockKey, int]] = []
        self.sizes: list[int] = []

    def grow(self) -> None:
        """One slot more."""
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
        """Takes one of each key away; how many of them were not there."""
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
    """The blocks of every worker, and a second layer of blocks assumed present for a short while.

    Slots are small integers handed out by `open` and used again after `drop`. Storing or removing a block is
    O(1); `clear`, `drop` and `replace` are O(blocks of that slot); `depths` is O(slots x log depth) lookups and
    hashes only the depths it probes.
    """

    __slots__ = ("_assumed", "_free", "_lives", "_stored")

    def __init__(self) -> None:
        self._stored = _Layer()
        self._assumed = _Layer()
        self._free: list[int] = []
        self._lives: list[int] = []

    # --- slots ------------------------------------------------------------------------------------------

    def open(self) -> int:
        """A slot for one more worker: empty, and the lowest that is free, so that masks stay narrow."""
        if self._free:
            slot = min(self._free)
            self._free.remove(slot)
            return slot
        self._stored.grow()
        self._assumed.grow()
        self._lives.append(0)
        return len(self._lives) - 1

    def drop(self, slot: int) -> None:
        """Forgets a worker that left; its slot is free for another."""
        self.clear(slot)
        self._free.append(slot)

    # --- what workers state -----------------------------------------------------------------------------

    def store(self, slot: int, keys: Sequence[BlockKey]) -> None:
        """One more physical block of each key."""
        self._stored.add(slot, keys)

    def remove(self, slot: int, keys: Sequence[BlockKey]) -> int:
        """One physical block less of each key; how many were not held (0 with a feed that is in order)."""
        return self._stored.discard(slot, keys)

    def clear(self, slot: int) -> None:
        """The worker's cache is empty. What was assumed of it is void too."""
        self._stored.replace(slot, ())
        self._assumed.replace(slot, ())
        self._lives[slot] += 1

    def replace(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The worker holds exactly these blocks (a key once for each physical block); assumptions stay."""
        self._stored.replace(slot, keys)

    def held(self, slot: int) -> Counter[BlockKey]:
        """Copy of the multiset of keys this slot holds."""
        return Counter(self._stored.counts[slot])

    def blocks(self, slot: int) -> int:
        """Physical blocks of this slot."""
        return self._stored.sizes[slot]

    def __len__(self) -> int:
        """Distinct keys that any worker states to hold."""
        return len(self._stored.masks)

    # --- what is assumed --------------------------------------------------------------------------------

    def assume(self, slot: int, keys: Sequence[BlockKey]) -> Assumption:
        """Counts these blocks as present until `withdraw`, or until the slot is cleared or dropped."""
        self._assumed.add(slot, keys)
        return Assumption(slot, self._lives[slot], keys)

    def withdraw(self, assumption: Assumption) -> None:
        """Ends an assumption; nothing happens when it has ended already."""
        keys, assumption._keys = assumption._keys, ()
        if assumption._life == self._lives[assumption._slot]:
            self._assumed.discard(assumption._slot, keys)

    def assumed_blocks(self) -> int:
        """Distinct keys that are assumed on any worker."""
        return len(self._assumed.masks)

    # --- search -----------------------------------------------------------------------------------------

    def depths(self, keys: PrefixKeys, among: int, limit: int) -> dict[int, int]:
        """How many leading blocks of the prompt each slot of the bitmask `among` holds, for those that hold any.

        Looks at depths up to `limit`. Relies on caches being prefix-closed: a worker that holds depth d holds
        every depth below, so one search over depths serves all workers, splitting where they part.
        """
        stored, assumed, key = self._stored.masks.get, self._assumed.masks.get, keys.key
        found: dict[int, int] = {}
        below, at, alive = 0, 1, among
        parted: list[tuple[int, int, int]] = []  # (depth they hold, depth they do not, slots)
        while alive and below < limit:
            at = min(at, limit)
            probe = key(at)
            have = (stored(probe, 0) | assumed(probe, 0)) & alive
            if alive != have:
                parted.append((below, at, alive & ~have))
            below, at, alive = at, at * 2, have
        if alive and below:
            _settle(found, alive, below)
        while parted:
            low, high, slots = parted.pop()
            if high - low == 1:
                if low:
                    _settle(found, slots, low)
                continue
            middle = (low + high) // 2
            probe = key(middle)
            have = (stored(probe, 0) | assumed(probe, 0)) & slots
            if slots != have:
                parted.append((low, middle, slots & ~have))
            if have:
                parted.append((middle, high, have))
        return found

    def stated_depth(self, keys: PrefixKeys, slot: int, limit: int) -> int:
        """How many leading blocks, of `limit` at most, the slot states to hold, assumptions aside."""
        counts = self._stored.counts[slot]
        low, high = 0, limit + 1
        probe = limit  # all of it is the usual answer
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
