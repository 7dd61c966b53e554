"""How much of one prompt each worker has cached, and how much of that it has to load.

The rule is vLLM's. The engine reuses the leading blocks that its GPU holds, but never the block of the last token.
Beyond them it loads every block of the unbroken run that its slower tiers hold, whether or not computing them would
take less time, and this run may include the block of the last token, which is then computed again in part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvcache.feed import Tier
from kvcache.keys import PrefixKeys
from router.core.decision import ReportedSequence
from router.core.index import PrefixIndex, bits

NO_LOAD: Mapping[Tier, int] = {}
_NO_LOADS: Mapping[int, Mapping[Tier, int]] = {}


class Matches(NamedTuple):
    """By slot; slots that hold nothing are left out. Blocks of the router."""

    held: Mapping[int, int]
    """Leading blocks on the GPU, or soon there."""
    loads: Mapping[int, Mapping[Tier, int]]
    """Blocks after these, by the tier that they are loaded from."""

    def blocks(self, slot: int) -> int:
        """Leading blocks that are not computed."""
        return self.held.get(slot, 0) + sum(self.loads.get(slot, NO_LOAD).values())

    def best(self) -> int:
        """The most blocks that any slot has."""
        best = max(self.held.values(), default=0)
        return max(best, *map(self.blocks, self.loads)) if self.loads else best

    def holders(self, blocks: int) -> int:
        """Slots that have at least so many, 1 or more."""
        if not self.loads:
            return sum(held >= blocks for held in self.held.values())
        return sum(self.blocks(slot) >= blocks for slot in self.held.keys() | self.loads.keys())


def find_matches(index: PrefixIndex, keys: PrefixKeys, among: int, reusable: int, loadable: int) -> Matches:
    """Search the slots of the bitmask `among`. `reusable`, `loadable`: the most leading blocks that may be reused on
    the GPU, and with those that are loaded."""
    held = index.depths(keys, among, reusable)
    loads = _NO_LOADS
    if index.has_slower_tiers:
        loads = index.loads(keys, {slot: held.get(slot, 0) for slot in bits(among)}, loadable)
    return Matches(held, loads)


def reported_blocks(index: PrefixIndex, reported: ReportedSequence, slot: int, *, usable: bool) -> int:
    """Cached blocks that the answer of this slot's worker is expected to report of a sequence. `usable`: what the index
    knows of the worker may be relied on."""
    stride = index.stride(slot)
    fresh = reported.fresh_blocks // stride * stride
    if not usable:
        return fresh
    # What an earlier sequence of the request loads or computes, this one finds on the GPU.
    found = find_matches(index, reported.keys, 1 << slot, reported.reusable_blocks, reported.keys.depth)
    return max(found.blocks(slot), fresh)


NO_MATCHES = Matches({}, {})
