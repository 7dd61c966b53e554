"""The blocks of a real engine by vLLM's block hash, with our key of each.

vLLM's hashes cannot be chained from what its events carry. A key is therefore computed from the block's tokens on top
of the hash state of its parent, which is kept for every block, so that a block costs one digest at any depth.
docs/vllm.md has measurements beside the alternative, which keeps tokens and parent links and hashes the prefix again
where it branches.

Invariant: the blocks held here are a subset of the engine's. They are all of them if every event since the engine's
start or its last clear was applied and no block was dropped (`DropReason`). A lost event therefore costs a hit, and
never claims a block that the engine does not hold, provided that a caller who may have lost a *removal* clears this
first.

The GPU's blocks are kept here, those of the slower tiers by `LowerTiers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

from kvcache.feed import Cleared, Event, HeldElsewhere, Removed, Stored, Tier
from kvcache.keys import (
    BYTES_PER_TOKEN,
    BlockKey,
    CacheScope,
    PrefixState,
    TokenIdError,
    pack_tokens,
    prefix_extended,
    prefix_start,
)
from worker.agent.core.events import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    EngineEvent,
    UnknownEvent,
    Unreadable,
)
from worker.agent.core.tiers import Identity, LowerTiers, is_local, tier_of

FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of attention whose blocks are reused as a prefix from the start of the prompt."""

EVENT_TYPES = ("stored", "removed", "cleared", "unknown", "unreadable")


class DropReason(StrEnum):
    """Why a block that the engine stored is not published."""

    UNKNOWN_PARENT = "unknown_parent"  # its prefix is not known: history was lost, or the parent was dropped
    MEDIUM = "medium"  # it lies where this module does not know, or its event does not say what it holds
    LOCALITY = "locality"  # it lies on a disk that is not known to be the engine's own
    CHUNK = "chunk"  # the engine loads it only together with other blocks
    UNIDENTIFIED = "unidentified"  # a slower tier holds it, and it was not seen on the GPU
    GROUP = "group"  # it belongs to another KV-cache group of a hybrid model
    KIND = "kind"  # its attention does not reuse whole prefixes
    BLOCK_SIZE = "block_size"  # it holds another number of tokens than the engine's metrics say
    ADAPTER = "adapter"  # its LoRA adapter is given by a number only
    EXTRA_KEYS = "extra_keys"  # an image or an embedding is part of its identity
    UNREADABLE = "unreadable"  # the event names no tokens, or not as many as its blocks hold


class _Changes:
    """Changes in order. Consecutive removals from one tier are one event, and so are the stores of consecutive blocks,
    which vLLM reports one by one for the slower tiers."""

    __slots__ = ("_keys", "_parent", "_stores", "_tier", "events")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._tier = Tier.GPU
        self._stores = False
        self._parent: BlockKey | None = None
        self._keys: list[BlockKey] = []

    def removed(self, tier: Tier, keys: list[BlockKey]) -> None:
        if not keys:
            return
        if self._keys and (self._stores or self._tier is not tier):
            self.flush()
        self._tier, self._stores = tier, False
        self._keys += keys

    def stored(self, tier: Tier, parent: BlockKey | None, key: BlockKey) -> None:
        if not (self._keys and self._stores and self._tier is tier and self._keys[-1] == parent):
            self.flush()
            self._tier, self._stores, self._parent = tier, True, parent
        self._keys.append(key)

    def flush(self) -> None:
        """Complete the event in progress."""
        if self._keys:
            keys, self._keys = tuple(self._keys), []
            self.events.append(Stored(self._parent, keys, self._tier) if self._stores else Removed(keys, self._tier))


class _UnkeyableError(Exception):
    """vLLM hashed something beside the tokens that has no counterpart in a key."""


class EngineBlocks:
    """Blocks of `block_size` tokens in KV-cache group `group`. Not thread-safe."""

    __slots__ = (
        "_adapters", "_blocks", "_duplicates", "_group", "_tiers", "block_size", "dropped", "events", "physical",
        "unknown_removals",
    )  # fmt: skip

    def __init__(self, block_size: int, group: int = 0) -> None:
        self.block_size = block_size
        self._group = group
        # Tuples of atomic values: the garbage collector stops visiting them.
        self._blocks: dict[BlockHash, Identity] = {}
        self._duplicates: Counter[BlockHash] = Counter()
        """Physical blocks with the same hash beyond the first (vLLM rule 9)."""
        self._adapters: dict[str, set[BlockHash]] = {}
        """The blocks of each LoRA adapter that has any."""
        self._tiers: LowerTiers | None = None
        """None until the engine first stores a block in one of them."""
        self.physical = 0
        """Physical blocks held on the GPU; those with the same hash count each."""
        self.events: Counter[str] = Counter()
        self.dropped: Counter[DropReason] = Counter()
        self.unknown_removals = 0
        """Removals of blocks that are not held: they were dropped, or stored before the first event applied."""

    def apply(self, events: Iterable[EngineEvent]) -> list[Event]:
        """Apply one batch. Returns its changes in order; consecutive removals are one event."""
        changes = _Changes()
        for event in events:
            if isinstance(event, BlockRemoved):
                self.events["removed"] += 1
                self._remove(event, changes)
            elif isinstance(event, BlockStored) and (tier := tier_of(event.medium)) is not Tier.GPU:
                self.events["stored"] += 1
                self._store_below(event, tier, changes)
            else:
                changes.flush()
                changes.events += self._other(event)
        changes.flush()
        return changes.events

    def clear(self) -> None:
        """Drop every block."""
        self._blocks.clear()
        self._duplicates.clear()
        self._adapters.clear()
        self._tiers = None
        self.physical = 0

    def forget(self, adapter: str) -> list[BlockKey]:
        """Drop the blocks of this adapter on the GPU. Returns their keys, one for each physical block."""
        keys: list[BlockKey] = []
        for name in self._adapters.pop(adapter, ()):
            keys += [self._blocks.pop(name)[0]] * (1 + self._duplicates.pop(name, 0))
        self.physical -= len(keys)
        return keys

    def blocks(self) -> Iterator[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every block held on the GPU; a key appears once for each physical block.

        Parents come first if no event was lost. Otherwise a parent that was removed and stored again may come later.
        """
        for name, (key, parent, _) in self._blocks.items():
            for _ in range(1 + self._duplicates[name] if name in self._duplicates else 1):
                yield key, parent

    def elsewhere(self) -> Iterable[HeldElsewhere]:
        """The blocks held in slower tiers."""
        return () if self._tiers is None else self._tiers.blocks(self._group)

    def held_below(self, tier: Tier) -> int:
        """Blocks held in a slower tier; those with the same hash count each."""
        return 0 if self._tiers is None else self._tiers.count(tier)

    def _other(self, event: EngineEvent) -> list[Event]:
        match event:
            case BlockStored():
                self.events["stored"] += 1
                return self._store(event)
            case AllBlocksCleared():
                self.events["cleared"] += 1
                self.clear()
                return [Cleared()]
            case Unreadable(blocks):
                self.events["unreadable"] += 1
                self.dropped[DropReason.UNREADABLE] += blocks
            case UnknownEvent():
                self.events["unknown"] += 1
        return []

    def _store(self, event: BlockStored) -> list[Event]:
        count = len(event.block_hashes)
        if (reason := self._refusal(event)) is not None:
            self.dropped[reason] += count
            return []
        try:
            packed = memoryview(pack_tokens(event.tokens))
            parent, state = self._start(event)
        except TokenIdError:
            self.dropped[DropReason.UNREADABLE] += count
            return []
        except _UnkeyableError:
            self.dropped[DropReason.EXTRA_KEYS] += count
            return []
        above, keys, size = parent, [], self.block_size * BYTES_PER_TOKEN
        for at, name in enumerate(event.block_hashes):
            if at and _extras(event, at):
                self.dropped[DropReason.EXTRA_KEYS] += count - at
                break
            held = self._blocks.get(name)
            if held is not None:
                self._duplicates[name] += 1
                above, _, state = held
            else:
                state, key = prefix_extended(state, packed[at * size : (at + 1) * size])
                self._blocks[name] = (key, above, state)
                if event.lora_name:
                    self._adapters.setdefault(event.lora_name, set()).add(name)
                above = key
            keys.append(above)
        self.physical += len(keys)
        return [Stored(parent, tuple(keys))] if keys else []

    def _store_below(self, event: BlockStored, tier: Tier | None, changes: _Changes) -> None:
        """Blocks were copied to a slower tier."""
        if tier is None:
            self.dropped[DropReason.MEDIUM] += len(event.block_hashes)
            return
        reason = DropReason.LOCALITY if not is_local(tier, event.locality) else self._refusal(event)
        if reason is None and len(event.block_hashes) > 1:
            reason = DropReason.CHUNK
        if reason not in (None, DropReason.UNKNOWN_PARENT):
            self.dropped[reason] += len(event.block_hashes)
            return
        if self._tiers is None:
            self._tiers = LowerTiers()
        for name in event.block_hashes:
            identity = self._blocks.get(name) or self._tiers.find(name)
            if identity is None:
                self.dropped[DropReason.UNIDENTIFIED] += 1
                continue
            dropped = self._tiers.store(tier, name, identity)
            changes.stored(tier, identity[1], identity[0])
            if dropped is not None:
                changes.removed(tier, [dropped])

    def _refusal(self, event: BlockStored) -> DropReason | None:
        if (event.group or 0) != self._group:
            return DropReason.GROUP
        if event.kind is not None and event.kind not in FULL_ATTENTION:
            return DropReason.KIND
        if event.block_size != self.block_size:
            return DropReason.BLOCK_SIZE
        if event.lora_id is not None and event.lora_name is None:
            return DropReason.ADAPTER
        if len(event.tokens) != len(event.block_hashes) * self.block_size:
            return DropReason.UNREADABLE
        if event.parent is not None and event.parent not in self._blocks:
            return DropReason.UNKNOWN_PARENT
        return None

    def _start(self, event: BlockStored) -> tuple[BlockKey | None, PrefixState]:
        """The key and hash state of the prefix before the first block. Raises `_UnkeyableError`."""
        extras = _extras(event, 0)
        if event.parent is not None:
            if extras:
                raise _UnkeyableError
            key, _, state = self._blocks[event.parent]
            return key, state
        # Only the first block of a prompt has a salt, which is one string. (Older versions represent an image as one
        # string, too; its blocks then get keys that no request asks for.)
        if len(extras) > 1 or any(type(extra) is not str for extra in extras):
            raise _UnkeyableError
        return None, prefix_start(CacheScope(salt=extras[0] if extras else "", adapter=event.lora_name or ""))

    def _remove(self, event: BlockRemoved, changes: _Changes) -> None:
        tier = tier_of(event.medium)
        if tier is None or (event.group or 0) != self._group:
            return
        keys: list[BlockKey] = []
        if tier is not Tier.GPU:
            if self._tiers is not None and is_local(tier, event.locality):
                below = [self._tiers.remove(tier, name) for name in event.block_hashes]
                keys = [key for key in below if key is not None]
                self.unknown_removals += len(below) - len(keys)
            changes.removed(tier, keys)
            return
        for name in event.block_hashes:
            if name in self._duplicates:
                self._duplicates[name] -= 1
                if not self._duplicates[name]:
                    del self._duplicates[name]
                keys.append(self._blocks[name][0])
            elif (held := self._blocks.pop(name, None)) is not None:
                keys.append(held[0])
                for named in self._adapters.values():
                    named.discard(name)
                if self._tiers is not None:
                    self._tiers.evicted(name, held)
            else:
                self.unknown_removals += 1
        self.physical -= len(keys)
        changes.removed(tier, keys)


def _extras(event: BlockStored, at: int) -> list[Any]:
    """What vLLM hashed into block `at` beside its tokens and the adapter's name (vLLM rule 3)."""
    extras = event.extra_keys[at] if at < len(event.extra_keys) else None
    if extras is None:
        return []
    if type(extras) is not list:
        return [extras]
    named = event.lora_name is not None and bool(extras) and extras[0] in (event.lora_name, event.lora_id)
    return extras[1:] if named else extras
