"""Which workers hold which blocks.

Shape: `masks` maps a block key to a bitmask of worker slots, and each slot has the set of its keys (`layer.Layer`).
Because a key names a whole prefix (`kvcache.keys`), the map is the trie: no node has children, and the depth of a match
is found by probing depths, not by walking.

There is one such layer for each tier and group of blocks (`kvcache.feed.Tier`), and one for blocks that are assumed.
Layers other than that of group 0 on the GPU exist from the first block on that a worker holds there.

Rejected: a tree of nodes, because every lookup would visit every depth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from kvcache.feed import HeldElsewhere, Tier
from kvcache.keys import BlockKey, PrefixKeys
from router.core.layer import Layer
from router.core.windows import Group, longest_served


class Run(NamedTuple):
    """Slots that hold equally many leading blocks of a prompt."""

    slots: int
    """A bitmask."""
    depth: int
    """In blocks of the router, 1 or more."""


class Assumption:
    """Blocks of a dispatched request, assumed present on its worker until the feed confirms them."""

    __slots__ = ("_generation", "_keys", "_slot")

    def __init__(self, slot: int, generation: int, keys: Sequence[BlockKey]) -> None:
        self._slot = slot
        self._generation = generation
        self._keys = keys


class PrefixIndex:
    """The blocks of every worker, and a second layer of blocks that are assumed present for a short while.

    Slots are small integers that `open` hands out and that are used again after `drop`. Storing or removing a block is
    O(1); `clear`, `drop` and `replace` are O(blocks of that slot); `depths` is O(slots x log depth) lookups and
    hashes only the depths it probes. Depths are in blocks of the router.
    """

    __slots__ = (
        "_assumed",
        "_elsewhere",
        "_free",
        "_generations",
        "_grouped",
        "_groups",
        "_slots_of",
        "_stored",
        "_strides",
    )  # fmt: skip

    def __init__(self) -> None:
        self._stored = Layer()
        self._elsewhere: dict[tuple[Tier, int], Layer] = {}
        """The layers of the other tiers and groups than the GPU's group 0."""
        self._assumed = Layer()
        self._free: list[int] = []
        self._generations: list[int] = []
        self._strides: list[int] = []
        """How many of the router's blocks a block of each slot is long."""
        self._slots_of: dict[int, int] = {}
        """Stride -> bitmask of the slots that have it, those with several groups aside."""
        self._groups: dict[int, tuple[Group, ...]] = {}
        """The groups of each slot that has not just one of full attention, and the bitmask of these slots."""
        self._grouped = 0

    # --- slots ------------------------------------------------------------------------------------------

    def open(self) -> int:
        """An empty slot for one more worker: the lowest that is free, so that masks stay narrow."""
        if self._free:
            slot = min(self._free)
            self._free.remove(slot)
        else:
            slot = len(self._generations)
            for layer in (self._stored, self._assumed, *self._elsewhere.values()):
                layer.grow()
            self._generations.append(0)
            self._strides.append(1)
        self.set_shape(slot, 1)
        return slot

    def drop(self, slot: int) -> None:
        """Forget a worker that left; its slot is free for another one."""
        self.clear(slot)
        self._free.append(slot)

    def set_shape(self, slot: int, stride: int, groups: tuple[Group, ...] = ()) -> None:
        """The worker's blocks are `stride` times as long as the router's: it has keys at the multiples of this depth.
        `groups`: those of a cache that has not just one group of full attention; `stride` is a multiple of theirs.
        Call it while the slot is empty; a slot is opened with stride 1."""
        bit = 1 << slot
        self._slots_of = {known: slots & ~bit for known, slots in self._slots_of.items() if slots & ~bit}
        self._groups.pop(slot, None)
        self._grouped &= ~bit
        self._strides[slot] = stride
        if groups:
            self._groups[slot] = groups
            self._grouped |= bit
        else:
            self._slots_of[stride] = self._slots_of.get(stride, 0) | bit

    def stride(self, slot: int) -> int:
        """How many of the router's blocks a block of this worker is long: its matches are multiples of it."""
        return self._strides[slot]

    # --- what workers state -----------------------------------------------------------------------------

    def store(self, slot: int, keys: Sequence[BlockKey], tier: Tier = Tier.GPU, group: int = 0) -> None:
        """The worker holds one more physical block of each key."""
        self._layer(tier, group).add(slot, keys)

    def remove(self, slot: int, keys: Sequence[BlockKey], tier: Tier = Tier.GPU, group: int = 0) -> int:
        """The worker holds one physical block less of each key. Returns how many it did not hold: 0 while the feed is
        in order.

        A worker that has evicted a group's last block of a key has stored it in every group since it was assumed, so
        that what it states is the truth again.
        """
        layer = self._layer(tier, group)
        missing = layer.discard(slot, keys)
        if tier is Tier.GPU and not (assumed := self._assumed.held[slot]).isdisjoint(keys):
            held = layer.held[slot]
            self._assumed.forget(slot, [key for key in keys if key in assumed and key not in held])
        return missing

    def clear(self, slot: int) -> None:
        """The worker's cache is empty, and assumptions about it are void."""
        self.replace(slot, ())
        self._assumed.replace(slot, ())
        self._generations[slot] += 1

    def replace(self, slot: int, keys: Iterable[BlockKey], elsewhere: Iterable[HeldElsewhere] = ()) -> None:
        """The worker holds exactly these blocks (each key once per physical block), and those `elsewhere`; assumptions
        stay."""
        self._stored.replace(slot, keys)
        others = {(held.tier, held.group): held.keys for held in elsewhere}
        for place in others:
            self._layer(*place)
        for place, layer in self._elsewhere.items():
            layer.replace(slot, others.get(place, ()))

    def _layer(self, tier: Tier, group: int) -> Layer:
        if tier is Tier.GPU and not group:
            return self._stored
        layer = self._elsewhere.get((tier, group))
        if layer is None:
            layer = self._elsewhere[tier, group] = Layer(len(self._generations))
        return layer

    def held(self, slot: int, tier: Tier = Tier.GPU, group: int = 0) -> Counter[BlockKey]:
        """A copy of the multiset of keys that this slot holds."""
        return self._layer(tier, group).counts(slot)

    @property
    def has_slower_tiers(self) -> bool:
        """Whether any worker holds a block in a slower tier."""
        if not self._elsewhere:
            return False
        return any(layer.masks for (tier, _), layer in self._elsewhere.items() if tier is not Tier.GPU)

    def blocks(self, slot: int, tier: Tier = Tier.GPU) -> int:
        """Physical blocks of this slot in this tier, of all groups."""
        return sum(self._layer(tier, group).sizes[slot] for group in range(max(1, len(self._groups.get(slot, ())))))

    def memory(self) -> int:
        """Bytes that the layers take, keys included, as near as can be told without looking at each key: see
        `Layer.memory`. O(slots)."""
        return sum(layer.memory() for layer in (self._stored, self._assumed, *self._elsewhere.values()))

    def __len__(self) -> int:
        """Distinct keys that any worker states that it holds on its GPU (group 0)."""
        return len(self._stored.masks)

    # --- what is assumed --------------------------------------------------------------------------------

    def assume_prompt(self, slot: int, keys: PrefixKeys, above: int) -> Assumption:
        """Count the blocks of a prompt that are deeper than `above` (a multiple of the stride) as present in every
        group, until `withdraw`, or until the slot is cleared or dropped."""
        stride = self._strides[slot]
        if slot in self._groups:
            stride = math.gcd(*(group.stride for group in self._groups[slot]))
        return self.assume(slot, keys.all(above, stride))

    def assume(self, slot: int, keys: Sequence[BlockKey]) -> Assumption:
        """Count these blocks as present until `withdraw`, until the worker evicts them, or until the slot is cleared or
        dropped. Of two requests that assume the same block, the end of the first after an eviction ends both."""
        self._assumed.add(slot, keys)
        return Assumption(slot, self._generations[slot], keys)

    def withdraw(self, assumption: Assumption) -> None:
        """End an assumption; this does nothing if it has ended already."""
        self.end(assumption)

    def end(self, assumption: Assumption) -> Sequence[BlockKey]:
        """`withdraw`. Returns the blocks that were assumed until now: none if it had ended already, or was void."""
        keys, assumption._keys = assumption._keys, ()
        if assumption._generation != self._generations[assumption._slot]:
            return ()
        self._assumed.discard(assumption._slot, keys)
        return keys

    def assumed_blocks(self) -> int:
        """Distinct keys that are assumed on any worker."""
        return len(self._assumed.masks)

    # --- search -----------------------------------------------------------------------------------------

    def runs(self, keys: PrefixKeys, among: int, limit: int) -> list[Run]:
        """How many leading blocks of the prompt, up to `limit`, each slot of the bitmask `among` holds. Each slot is in
        one run, or in none if it holds no block. The depths of a slot are multiples of its stride."""
        found: list[Run] = []
        for stride, slots in self._slots_of.items():
            if slots & among and limit >= stride:
                self._search(found, keys, slots & among, limit // stride, stride)
        if self._grouped & among:
            for slot in bits(self._grouped & among):
                depth = self._served(keys, slot, limit, assumed=self._assumed.held[slot])
                if depth:
                    found.append(Run(1 << slot, depth))
        return found

    def depths(self, keys: PrefixKeys, among: int, limit: int) -> dict[int, int]:
        """The depth of each slot that is in one of the `runs`."""
        return depths_of(self.runs(keys, among, limit))

    def _served(self, keys: PrefixKeys, slot: int, limit: int, assumed: Container[BlockKey]) -> int:
        """How many leading blocks a slot with several groups can serve, up to `limit`."""
        groups = self._groups[slot]
        stated = [self._layer(Tier.GPU, group).held[slot] for group in range(len(groups))]
        if assumed:
            return longest_served(
                keys, limit, self._strides[slot], groups, [partial(_in_either, held, assumed) for held in stated]
            )
        return longest_served(keys, limit, self._strides[slot], groups, [held.__contains__ for held in stated])

    def _search(self, found: list[Run], keys: PrefixKeys, among: int, limit: int, stride: int) -> None:
        """Append the runs of the slots `among`, whose stride this is, to `found`. `limit` is in their own blocks.

        Caches are prefix-closed: a worker that holds depth d holds every depth below. So one search over depths serves
        all workers of a stride and splits where they differ.
        """
        stored, assumed, key = self._stored.masks.get, self._assumed.masks.get, keys.key
        below, at, alive = 0, 1, among
        split: list[tuple[int, int, int]] = []  # (depth they hold, depth they do not, slots)
        while alive and below < limit:
            at = min(at, limit)
            probe = key(at * stride)
            have = (stored(probe, 0) | assumed(probe, 0)) & alive
            if alive != have:
                split.append((below, at, alive & ~have))
            below, at, alive = at, at * 2, have
        if alive and below:
            found.append(Run(alive, below * stride))
        while split:
            low, high, slots = split.pop()
            if high - low == 1:
                if low:
                    found.append(Run(slots, low * stride))
                continue
            middle = (low + high) // 2
            probe = key(middle * stride)
            have = (stored(probe, 0) | assumed(probe, 0)) & slots
            if slots != have:
                split.append((low, middle, slots & ~have))
            if have:
                split.append((middle, high, have))

    def loads(self, keys: PrefixKeys, starts: Mapping[int, int], limit: int) -> Mapping[int, Mapping[Tier, int]]:
        """How many blocks of the prompt each slot can load from its slower tiers, by tier: the unbroken run that begins
        after the depth that it holds (`starts`, slots with their depths) and ends at `limit`. Slots that can load none
        are left out.

        A slower tier is not prefix-closed: an engine may evict a block from it and keep the block's children. So every
        depth of a run is looked up; the number of lookups is the length of the longest run, whatever the number of
        slots, and 0 while there are no blocks in slower tiers. A block in two tiers counts for the faster one.
        """
        found: dict[int, dict[Tier, int]] = {}
        if any((layer := self._elsewhere.get((tier, 0))) is not None and layer.masks for tier in _SLOWER):
            for stride, slots in self._slots_of.items():
                of_stride = {slot: depth // stride for slot, depth in starts.items() if slots >> slot & 1}
                if of_stride:
                    self._search_loads(found, keys, of_stride, limit // stride, stride)
        return found

    def _search_loads(
        self, found: dict[int, dict[Tier, int]], keys: PrefixKeys, starts: Mapping[int, int], limit: int, stride: int
    ) -> None:
        """Put what the slots of one stride can load into `found`. `starts` and `limit` are in their own blocks."""
        runs = [
            _Runs(tier, layer.masks, stride)
            for tier in _SLOWER
            if (layer := self._elsewhere.get((tier, 0))) is not None and layer.masks
        ]
        joining = sorted(((depth, slot) for slot, depth in starts.items() if depth < limit), reverse=True)
        alive, depth = 0, limit
        following: Iterator[BlockKey] = iter(())
        while joining or alive:
            if not alive:
                depth = joining[-1][0]
                following = keys.between(depth * stride, limit * stride, stride)
            while joining and joining[-1][0] == depth:
                alive |= 1 << joining.pop()[1]
            depth += 1
            held, key = 0, next(following)
            for run in runs:
                held |= run.at(depth, key, alive & ~held, found)
            alive = held if depth < limit else 0
        for run in runs:
            run.end(depth + 1, found)

    def stated_depth(self, keys: PrefixKeys, slot: int, limit: int) -> int:
        """How many leading blocks of the prompt, up to `limit`, the worker itself states that it holds."""
        if slot in self._groups:
            return self._served(keys, slot, limit, assumed=())
        held, stride = self._stored.held[slot], self._strides[slot]
        low, high = 0, limit // stride + 1
        probe = high - 1  # the usual answer is all of it
        while high - low > 1:
            if keys.key(probe * stride) in held:
                low = probe
            else:
                high = probe
            probe = (low + high) // 2
        return low * stride


class _Runs:
    """The runs that one tier contributes to a search for loads: which slots are in one, and where it began."""

    __slots__ = ("_began", "_masks", "_now", "_stride", "_tier")

    def __init__(self, tier: Tier, masks: dict[BlockKey, int], stride: int) -> None:
        self._tier = tier
        self._masks = masks
        self._stride = stride
        self._now = 0
        self._began: dict[int, int] = {}

    def at(self, depth: int, key: BlockKey, wanted: int, found: dict[int, dict[Tier, int]]) -> int:
        """The slots of the bitmask `wanted` that hold this block, the next deeper one of the prompt, in this tier."""
        here = self._masks.get(key, 0) & wanted
        if here != self._now:
            self._leave(self._now & ~here, depth, found)
            for slot in bits(here & ~self._now):
                self._began[slot] = depth
            self._now = here
        return here

    def end(self, depth: int, found: dict[int, dict[Tier, int]]) -> None:
        """No run of this tier reaches `depth`."""
        self._leave(self._now, depth, found)

    def _leave(self, slots: int, depth: int, found: dict[int, dict[Tier, int]]) -> None:
        for slot in bits(slots):
            run = found.setdefault(slot, {})
            run[self._tier] = run.get(self._tier, 0) + (depth - self._began[slot]) * self._stride


_SLOWER = (Tier.CPU, Tier.DISK)
"""The tiers other than the GPU's, the faster first."""


def _in_either(held: Container[BlockKey], assumed: Container[BlockKey], key: BlockKey) -> bool:
    return key in held or key in assumed


def depths_of(runs: Iterable[Run]) -> dict[int, int]:
    """The depth of each slot."""
    return {slot: depth for slots, depth in runs for slot in bits(slots)}


def bits(mask: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
