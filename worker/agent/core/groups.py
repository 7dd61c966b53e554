"""The blocks of a real engine, in all of its KV-cache groups.

vLLM has one group for most models. A model whose layers attend in different ways has several, and a prefix is reused
as far as each of them can serve it (docs/routing.md). Which groups there are is known from the events: each says its
group, the kind of its attention, its window and its block size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from kvcache.feed import FULL_ATTENTION, SLIDING_WINDOW, CacheGroup, Cleared, Event, HeldElsewhere, Tier
from kvcache.keys import BlockKey
from worker.agent.core.blocks import DropReason, GroupBlocks
from worker.agent.core.changes import Changes
from worker.agent.core.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineEvent,
    UnknownEvent,
    Unreadable,
)
from worker.agent.core.tiers import is_local, tier_of

FULL_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of attention whose blocks are reused as a prefix from the start of the prompt."""
SLIDING_KINDS = frozenset({"sliding_window", "sliding_window_mla"})
UNKNOWN = CacheGroup("unknown", 1)
"""A group of which there was no event yet, although one with a higher number had one."""
MAX_GROUPS = 64
"""Events of groups with a number of this or more are ignored: vLLM has a few groups."""

EVENT_TYPES = ("stored", "removed", "cleared", "unknown", "unreadable")


class EngineBlocks:
    """The blocks of every group. Not thread-safe."""

    __slots__ = ("_block_size", "_groups", "_shapes", "dropped", "events")

    def __init__(self, block_size: int) -> None:
        """`block_size`: what the engine's metrics say. A group may have blocks that are longer by a whole factor."""
        self._block_size = block_size
        self._groups: dict[int, GroupBlocks] = {}
        self._shapes: dict[int, CacheGroup] = {}
        self.events: Counter[str] = Counter()
        self.dropped: Counter[DropReason] = Counter()

    @property
    def block_size(self) -> int:
        """Tokens of a block; with several groups, the least number that is a multiple of each group's."""
        return math.lcm(*(shape.block_size for shape in self._shapes.values())) if self._shapes else self._block_size

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The groups by their numbers, as the feed states them: none if there is just one of full attention."""
        shapes = tuple(self._shapes.get(number, UNKNOWN) for number in range(max(self._shapes, default=-1) + 1))
        return () if len(shapes) <= 1 and all(shape.attention == FULL_ATTENTION for shape in shapes) else shapes

    @property
    def physical(self) -> int:
        """Physical blocks held on the GPU; those with the same hash count each."""
        return sum(group.physical for group in self._groups.values())

    @property
    def unknown_removals(self) -> int:
        """Removals of blocks that are not held: they were dropped, or stored before the first event applied."""
        return sum(group.unknown_removals for group in self._groups.values())

    def apply(self, events: Iterable[EngineEvent]) -> list[Event]:
        """Apply one batch. Returns its changes in order; consecutive removals are one event."""
        changes = Changes()
        partial: list[tuple[GroupBlocks, BlockStored]] = []
        for event in events:
            match event:
                case BlockRemoved():
                    self.events["removed"] += 1
                    if (removing := self._groups.get(event.group or 0)) is not None:
                        removing.remove(event, changes)
                case BlockStored():
                    self.events["stored"] += 1
                    self._store(event, changes, partial)
                case AllBlocksCleared():
                    self.events["cleared"] += 1
                    for group in self._groups.values():
                        group.clear()
                    changes.other(Cleared())
                case Unreadable(blocks):
                    self.events["unreadable"] += 1
                    self.dropped[DropReason.UNREADABLE] += blocks
                case UnknownEvent():
                    self.events["unknown"] += 1
        for group, event in partial:
            group.store_some(event, changes)
        return changes.take()

    def clear(self) -> None:
        """Forget every block and group."""
        self._shapes.clear()
        for group in self._groups.values():
            group.clear()

    def forget(self, adapter: str) -> list[Event]:
        """Drop the blocks of this adapter. Returns the changes."""
        changes = Changes()
        for group in self._groups.values():
            group.forget(adapter, changes)
        return changes.take()

    def blocks(self) -> Iterator[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every block of group 0 on the GPU: see `GroupBlocks.blocks`."""
        return self._groups[0].blocks() if 0 in self._groups else iter(())

    def elsewhere(self) -> Iterator[HeldElsewhere]:
        """The blocks of the other groups, and those in slower tiers."""
        for number, group in self._groups.items():
            if number and group.physical:
                yield HeldElsewhere(Tier.GPU, number, tuple(key for key, _ in group.blocks()))
            yield from group.elsewhere()

    def held_below(self, tier: Tier) -> int:
        """Blocks held in a slower tier; those with the same hash count each."""
        return sum(group.held_below(tier) for group in self._groups.values())

    def _store(self, event: BlockStored, changes: Changes, partial: list[tuple[GroupBlocks, BlockStored]]) -> None:
        number = event.group or 0
        tier = tier_of(event.medium)
        if number >= MAX_GROUPS or number < 0:
            self.dropped[DropReason.KIND] += len(event.block_hashes)
            return
        if number not in self._shapes:
            if event.block_size % self._block_size:
                self.dropped[DropReason.BLOCK_SIZE] += len(event.block_hashes)
                return
            self._shapes[number] = _shape(event)
            if number not in self._groups or self._groups[number].block_size != event.block_size:
                self._groups[number] = GroupBlocks(event.block_size, number, self._groups, self.dropped)
        if self._shapes[number].attention not in (FULL_ATTENTION, SLIDING_WINDOW):
            self.dropped[DropReason.KIND] += len(event.block_hashes)
            return
        group = self._groups[number]
        if tier is Tier.GPU and not is_local(tier, event.locality):
            self.dropped[DropReason.LOCALITY] += len(event.block_hashes)
        elif tier is not Tier.GPU:
            group.store_below(event, tier, changes)
        elif self._shapes[number].window and len(event.tokens) > len(event.block_hashes) * event.block_size:
            # Of a sliding window, vLLM may leave out blocks that no hit can need. The event has the tokens of all.
            partial.append((group, event))
        else:
            group.store(event, changes)


def _shape(event: BlockStored) -> CacheGroup:
    """The group of an event. Versions before about 0.24 do not say the kind, and publish groups of any; they are taken
    to have one of full attention."""
    kind = event.kind or "full_attention"
    if kind in FULL_KINDS:
        return CacheGroup(FULL_ATTENTION, event.block_size)
    if kind in SLIDING_KINDS and event.window is not None and event.window > 0:
        return CacheGroup(SLIDING_WINDOW, event.block_size, event.window)
    return CacheGroup(kind, event.block_size)
