"""What changes in the cache of an emulated engine.

An event carries what both of its readers need: the cache feed the keys (`feed_events`), vLLM's KV events the tokens and
the scope. Reading the tokens is left to those who want them, so that an engine that nobody listens to pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcache.feed import Cleared, Event, Removed, Stored, Tier
from kvcache.keys import BlockKey
from worker.emulator.engine.tokens import SequenceTokens


@dataclass(slots=True)
class BlocksStored:
    """Consecutive blocks of one sequence that can be hit from now on. A value, but not frozen, which would double the
    cost of making one."""

    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    """Key of the block before the first; None when the run starts a prompt."""
    sequence: SequenceTokens
    """What the blocks hold. It grows on, but not within them."""
    first: int
    """Index of the first block in the sequence."""
    tier: Tier = Tier.GPU
    group: int = 0
    """KV-cache group: the layers whose blocks these are."""


@dataclass(slots=True)
class BlocksRemoved:
    """Blocks that were evicted from one tier of one group, in the order of their eviction."""

    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.GPU
    group: int = 0


@dataclass(slots=True)
class CacheCleared:
    """The whole cache was reset."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


def feed_events(events: Iterable[CacheEvent]) -> list[Event]:
    """The same changes as events of the cache feed."""
    return [_feed_event(event) for event in events]


def _feed_event(event: CacheEvent) -> Event:
    match event:
        case BlocksStored(keys, parent, _, _, tier, group):
            return Stored(parent, keys, tier, group)
        case BlocksRemoved(keys, tier, group):
            return Removed(keys, tier, group)
        case CacheCleared():
            return Cleared()
