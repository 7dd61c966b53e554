"""How much of one prompt each worker has cached, and how much of that it has to load.

The rule is vLLM's. The engine reuses the leading blocks that its GPU holds, but never the block of the last token.
Beyond them it loads every block of the unbroken run that its slower tiers hold, whether or not computing them would
take less time, and this run may include the block of the last token, which is then computed again in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from kvcache.feed import Tier
from kvcache.keys import PrefixKeys
from router.core.decision import ReportedSequence
from router.core.index import PrefixIndex, Run, bits, depths_of

NO_LOAD: Mapping[Tier, int] = {}
_NO_LOADS: Mapping[int, Mapping[Tier, int]] = {}


class Matches:
    """What each slot holds of a prompt; slots that hold nothing are left out. Blocks of the router."""

    def __init__(self, runs: Sequence[Run], loads: Mapping[int, Mapping[Tier, int]] = _NO_LOADS) -> None:
        self.runs = runs
        """Leading blocks on the GPU, or soon there."""
        self.loads = loads
        """By slot: blocks after these, by the tier that they are loaded from."""

    @cached_property
    def held(self) -> Mapping[int, int]:
        """Leading blocks on the GPU by slot: O(slots), once."""
        return depths_of(self.runs)

    def held_by(self, slot: int) -> int:
        """Leading blocks on the GPU of one slot: O(runs), for who asks for a few slots of many."""
        bit = 1 << slot
        for slots, depth in self.runs:
            if slots & bit:
                return depth
        return 0

    def blocks(self, slot: int) -> int:
        """Leading blocks that are not computed."""
        return self.held.get(slot, 0) + sum(self.loads.get(slot, NO_LOAD).values())

    def best(self) -> int:
        """The most blocks that any slot has."""
        best = max((depth for _, depth in self.runs), default=0)
        return max(best, *map(self.blocks, self.loads)) if self.loads else best

    def holders(self, blocks: int) -> int:
        """Slots that have at least so many, 1 or more."""
        if not self.loads:
            return sum(slots.bit_count() for slots, depth in self.runs if depth >= blocks)
        return sum(self.blocks(slot) >= blocks for slot in self.held.keys() | self.loads.keys())


def find_matches(index: PrefixIndex, keys: PrefixKeys, among: int, reusable: int, loadable: int) -> Matches:
    """Search the slots of the bitmask `among`. `reusable`, `loadable`: the most leading blocks that may be reused on
    the GPU, and with those that are loaded."""
    runs = index.runs(keys, among, reusable)
    if not index.has_slower_tiers:
        return Matches(runs)
    held = depths_of(runs)
    return Matches(runs, index.loads(keys, {slot: held.get(slot, 0) for slot in bits(among)}, loadable))


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


NO_MATCHES = Matches(())
