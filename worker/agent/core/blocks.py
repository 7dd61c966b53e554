"""The blocks of one KV-cache group of a real engine by vLLM's block hash, with our key of each.

vLLM's hashes cannot be chained from what its events carry. A key is therefore computed from the block's tokens on top
of the hash state of its parent, which is kept for every block, so that a block costs one digest at any depth.
docs/vllm.md has measurements beside the alternative, which keeps tokens and parent links and hashes the prefix again
where it branches.

Invariant: the blocks held here are a subset of the engine's. They are all of them if every event since the engine's
start or its last clear was applied and no block was dropped (`DropReason`). A lost event therefore costs a hit, and
never claims a block that the engine does not hold, provided that a caller who may have lost a *removal* clears this
first.

The GPU's blocks are kept here, those of the slower tiers by `LowerTiers`. Several groups (`groups`) hold blocks of the
same hashes, which are of the same content; what one of them knows of a block serves the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from kvcache.feed import HeldElsewhere, Tier
from kvcache.keys import (
    BYTES_PER_TOKEN,
    BlockKey,
    CacheScope,
    Image,
    PrefixState,
    TokenIdError,
    pack_tokens,
    prefix_extended,
    prefix_start,
)
from worker.agent.core.changes import Changes
from worker.agent.core.events import BlockHash, BlockRemoved, BlockStored
from worker.agent.core.tiers import Identity, LowerTiers, is_local, tier_of


class DropReason(StrEnum):
    """Why a block that the engine stored is not published."""

    UNKNOWN_PARENT = "unknown_parent"  # its prefix is not known: history was lost, or the parent was dropped
    MEDIUM = "medium"  # it lies where this module does not know, or its event does not say what it holds
    LOCALITY = "locality"  # it is not the engine's own, or lies on a disk that is not known to be
    CHUNK = "chunk"  # the engine loads it only together with other blocks
    UNIDENTIFIED = "unidentified"  # a slower tier holds it, and it was not seen on the GPU
    KIND = "kind"  # it is not modelled what its attention reuses of a prefix
    BLOCK_SIZE = "block_size"  # it does not hold as many tokens as the engine says or as the others of its group
    ADAPTER = "adapter"  # its LoRA adapter is given by a number only
    EXTRA_KEYS = "extra_keys"  # an embedding is part of its identity, or something unknown
    UNREADABLE = "unreadable"  # the event names no tokens, or not as many as its blocks hold


class _UnkeyableError(Exception):
    """vLLM hashed something beside the tokens that has no counterpart in a key."""


class GroupBlocks:
    """Blocks of `block_size` tokens in one KV-cache group. Not thread-safe.

    `siblings` are the groups of the engine, this one included; `dropped` counts what is not published.
    """

    __slots__ = (
        "_blocks", "_dropped", "_duplicates", "_group", "_siblings", "_tiers", "block_size", "physical",
        "unknown_removals",
    )  # fmt: skip

    def __init__(
        self, block_size: int, group: int, siblings: Mapping[int, GroupBlocks], dropped: Counter[DropReason]
    ) -> None:
        self.block_size = block_size
        self._group = group
        self._siblings = siblings
        self._dropped = dropped
        # Tuples of atomic values: the garbage collector stops visiting them.
        self._blocks: dict[BlockHash, Identity] = {}
        self._duplicates: Counter[BlockHash] = Counter()
        """Physical blocks with the same hash beyond the first (vLLM rule 9)."""
        self._tiers: LowerTiers | None = None
        """None until the engine first stores a block in one of them."""
        self.physical = 0
        """Physical blocks held on the GPU; those with the same hash count each."""
        self.unknown_removals = 0
        """Removals of blocks that are not held: they were dropped, or stored before the first event applied."""

    def clear(self) -> None:
        """Drop every block."""
        self._blocks.clear()
        self._duplicates.clear()
        self._tiers = None
        self.physical = 0

    def forget(self, adapter: str, changes: Changes) -> None:
        """Drop the blocks of this LoRA adapter in every tier. O(blocks)."""
        names = [name for name, (*_, of) in self._blocks.items() if of == adapter]
        keys: list[BlockKey] = []
        for name in names:
            keys += [self._blocks.pop(name)[0]] * (1 + self._duplicates.pop(name, 0))
        self.physical -= len(keys)
        changes.removed((Tier.GPU, self._group), keys)
        if self._tiers is not None:
            for tier, dropped in self._tiers.forget(adapter):
                changes.removed((tier, self._group), dropped)

    def blocks(self) -> Iterator[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every block held on the GPU; a key appears once for each physical block.

        Parents come first if no event was lost. Otherwise a parent that was removed and stored again may come later.
        """
        for name, (key, parent, *_) in self._blocks.items():
            for _ in range(1 + self._duplicates[name] if name in self._duplicates else 1):
                yield key, parent

    def elsewhere(self) -> Iterable[HeldElsewhere]:
        """The blocks held in slower tiers."""
        return () if self._tiers is None else self._tiers.blocks(self._group)

    def held_below(self, tier: Tier) -> int:
        """Blocks held in a slower tier; those with the same hash count each."""
        return 0 if self._tiers is None else self._tiers.count(tier)

    def find(self, name: BlockHash) -> Identity | None:
        """What the block of this hash is, if it is held on the GPU."""
        return self._blocks.get(name)

    def store(self, event: BlockStored, changes: Changes) -> None:
        """Blocks were stored on the GPU."""
        count = len(event.block_hashes)
        if (reason := self._refusal(event)) is not None:
            self._dropped[reason] += count
            return
        try:
            packed = memoryview(pack_tokens(event.tokens))
            parent, state = self._start(event)
        except TokenIdError:
            self._dropped[DropReason.UNREADABLE] += count
            return
        except _UnkeyableError:
            self._dropped[DropReason.EXTRA_KEYS] += count
            return
        above, keys, size = parent, [], self.block_size * BYTES_PER_TOKEN
        lonely = len(self._siblings) == 1
        for at, name in enumerate(event.block_hashes):
            images: tuple[Image, ...] = ()
            if event.extra_keys and (extras := _extras(event, at)):
                found = _images(extras, self.block_size, salted=at == 0 and event.parent is None)
                if found is None:
                    self._dropped[DropReason.EXTRA_KEYS] += count - at
                    break
                images = found
            held = self._blocks.get(name)
            if held is not None:
                self._duplicates[name] += 1
                above, _, state, _ = held
            else:
                known = None if lonely else self._known(name)
                if known is None:
                    state, key = prefix_extended(state, packed[at * size : (at + 1) * size], images)
                    known = (key, above, state, event.lora_name or "")
                self._blocks[name] = known
                above, _, state, _ = known
            keys.append(above)
        self.physical += len(keys)
        changes.stored((Tier.GPU, self._group), parent, keys)

    def store_some(self, event: BlockStored, changes: Changes) -> None:
        """Some blocks of a run were stored on the GPU; the event has the tokens of all, and does not say which were.
        Those are kept that another group holds."""
        if event.block_size != self.block_size:
            self._dropped[DropReason.BLOCK_SIZE] += len(event.block_hashes)
            return
        for name in event.block_hashes:
            known = self._known(name)
            if known is None:
                self._dropped[DropReason.UNREADABLE] += 1
                continue
            if name in self._blocks:
                self._duplicates[name] += 1
            self._blocks[name] = known
            self.physical += 1
            changes.stored((Tier.GPU, self._group), known[1], [known[0]])

    def store_below(self, event: BlockStored, tier: Tier | None, changes: Changes) -> None:
        """Blocks were copied to a slower tier."""
        if tier is None:
            self._dropped[DropReason.MEDIUM] += len(event.block_hashes)
            return
        reason = DropReason.LOCALITY if not is_local(tier, event.locality) else self._refusal(event)
        if reason is None and len(event.block_hashes) > 1:
            reason = DropReason.CHUNK
        if reason not in (None, DropReason.UNKNOWN_PARENT):
            self._dropped[reason] += len(event.block_hashes)
            return
        if self._tiers is None:
            self._tiers = LowerTiers()
        for name in event.block_hashes:
            identity = self._blocks.get(name) or self._tiers.find(name)
            if identity is None:
                self._dropped[DropReason.UNIDENTIFIED] += 1
                continue
            dropped = self._tiers.store(tier, name, identity)
            changes.stored((tier, self._group), identity[1], [identity[0]])
            if dropped is not None:
                changes.removed((tier, self._group), [dropped])

    def remove(self, event: BlockRemoved, changes: Changes) -> None:
        """Blocks were evicted from a tier."""
        tier = tier_of(event.medium)
        if tier is None or not is_local(tier, event.locality):
            return
        keys: list[BlockKey] = []
        if tier is not Tier.GPU:
            if self._tiers is not None:
                below = [self._tiers.remove(tier, name) for name in event.block_hashes]
                keys = [key for key in below if key is not None]
                self.unknown_removals += len(below) - len(keys)
            changes.removed((tier, self._group), keys)
            return
        for name in event.block_hashes:
            if name in self._duplicates:
                self._duplicates[name] -= 1
                if not self._duplicates[name]:
                    del self._duplicates[name]
                keys.append(self._blocks[name][0])
            elif (held := self._blocks.pop(name, None)) is not None:
                keys.append(held[0])
                if self._tiers is not None:
                    self._tiers.evicted(name, held)
            else:
                self.unknown_removals += 1
        self.physical -= len(keys)
        changes.removed((tier, self._group), keys)

    def _known(self, name: BlockHash) -> Identity | None:
        for sibling in self._siblings.values():
            if (known := sibling.find(name)) is not None:
                return known
        return None

    def _refusal(self, event: BlockStored) -> DropReason | None:
        if event.block_size != self.block_size:
            return DropReason.BLOCK_SIZE
        if event.lora_id is not None and not event.lora_name:
            return DropReason.ADAPTER
        if len(event.tokens) != len(event.block_hashes) * self.block_size:
            return DropReason.UNREADABLE
        if event.parent is not None and self._known(event.parent) is None:
            return DropReason.UNKNOWN_PARENT
        return None

    def _start(self, event: BlockStored) -> tuple[BlockKey | None, PrefixState]:
        """The key and hash state of the prefix before the first block. Raises `_UnkeyableError`."""
        if event.parent is not None and (known := self._known(event.parent)) is not None:
            key, _, state, _ = known
            return key, state
        # Only the first block of a prompt has a salt. (Older versions represent an image as one string, too; its blocks
        # then get keys that no request asks for.)
        salts = [extra for extra in _extras(event, 0) if type(extra) is str]
        if len(salts) > 1:
            raise _UnkeyableError
        return None, prefix_start(CacheScope(salt=salts[0] if salts else "", adapter=event.lora_name or ""))


def _extras(event: BlockStored, at: int) -> list[Any]:
    """What vLLM hashed into block `at` beside its tokens and the adapter's name (vLLM rule 3)."""
    extras = event.extra_keys[at] if at < len(event.extra_keys) else None
    if extras is None:
        return []
    if type(extras) is not list:
        return [extras]
    named = event.lora_name is not None and bool(extras) and extras[0] in (event.lora_name, event.lora_id)
    return extras[1:] if named else extras


def _images(extras: list[Any], block_size: int, *, salted: bool) -> tuple[Image, ...] | None:
    """The images that begin in a block, by what vLLM hashed into it: pairs of an image's identifier and where it
    begins, relative to the block. One that began before has a negative position, and is in the key of the block where
    it began. None: something else was hashed, too. `salted`: the block may have a salt."""
    images: list[Image] = []
    for extra in extras:
        if salted and type(extra) is str:
            continue
        if not (type(extra) is list and len(extra) == 2 and type(extra[0]) is str and type(extra[1]) is int):
            return None
        identifier, position = extra
        if position >= block_size or (images and position <= images[-1][0]) or (salted and position < 0):
            return None
        if position >= 0:
            images.append((position, identifier))
    return tuple(images)
