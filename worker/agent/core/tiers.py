"""The blocks that the engine holds outside the GPU, by vLLM's block hash.

An event of a lower tier does not say everything that vLLM hashed: its offloading connector leaves the extra keys (salt,
images) out (`.../kv_connector/v1/offloading/events.py`). A key computed from the tokens of such an event might be that
of another prompt. So a block gets the key that its hash had on the GPU, where every block is stored first, and a block
that was never seen there is not published. The GPU may evict a block before its copy is reported; the identities of the
blocks that it evicted last are kept for that.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from kvcache.feed import HeldElsewhere, Tier
from kvcache.keys import BlockKey, PrefixState
from worker.agent.core.events import BlockHash

Identity = tuple[BlockKey, BlockKey | None, PrefixState, str]
"""Key, parent's key, hash state and LoRA adapter (empty: none) of a block."""

MEDIA: Mapping[str, Tier] = {
    "": Tier.GPU,
    "GPU": Tier.GPU,
    "CPU": Tier.CPU,
    "CPU_PINNED": Tier.CPU,
    "CPU_TIER1": Tier.CPU,
    "STORAGE": Tier.DISK,
    "FS": Tier.DISK,
    "OBJ": Tier.DISK,
}
"""The tier of each `medium`, in capitals: the names of vLLM 0.27 and later, and of versions before."""
LOCAL = "LOCAL"

EVICTED_LATELY = 4096
"""Blocks whose identities are kept after the GPU evicted them. A copy is reported two steps after the block was stored
on the GPU, and a step evicts no more blocks than it computes: 512 of 16 tokens, with vLLM's limit for large GPUs."""
DISK_BLOCKS = 65_536
"""Blocks on a disk that are kept, those stored last: vLLM reports no removals from its file and object tiers."""


def tier_of(medium: str | None) -> Tier | None:
    """None: it is not known."""
    return MEDIA.get((medium or "").upper())


def is_local(tier: Tier, locality: str | None) -> bool:
    """Whether the engine itself can load the blocks, at the speed of its own machine. vLLM's CPU tier is the engine's
    own memory and does not say; for a disk, silence may mean anything."""
    return locality == LOCAL or (locality is None and tier is not Tier.DISK)


class LowerTiers:
    """How often each tier holds each block, and what the blocks are."""

    __slots__ = ("_evicted", "_held", "_identities")

    def __init__(self) -> None:
        self._held: dict[Tier, dict[BlockHash, int]] = {Tier.CPU: {}, Tier.DISK: {}}
        self._identities: dict[BlockHash, Identity] = {}
        """Of every block held."""
        self._evicted: OrderedDict[BlockHash, Identity] = OrderedDict()

    def find(self, name: BlockHash) -> Identity | None:
        """What the block is, if it is held or was evicted from the GPU lately."""
        return self._identities.get(name) or self._evicted.get(name)

    def evicted(self, name: BlockHash, identity: Identity) -> None:
        """The GPU holds the block no more."""
        self._evicted[name] = identity
        if len(self._evicted) > EVICTED_LATELY:
            self._evicted.popitem(last=False)

    def store(self, tier: Tier, name: BlockHash, identity: Identity) -> BlockKey | None:
        """The tier holds the block once more. Returns the key of a block that is no longer kept in exchange."""
        held = self._held[tier]
        held[name] = held.get(name, 0) + 1
        self._identities[name] = identity
        if tier is Tier.DISK and len(held) > DISK_BLOCKS:
            oldest = next(iter(held))
            dropped = self._identities[oldest][0]
            held[oldest] = 1
            self.remove(tier, oldest)
            return dropped
        return None

    def remove(self, tier: Tier, name: BlockHash) -> BlockKey | None:
        """The tier holds the block once less. Returns its key; None: it was not held."""
        held = self._held[tier]
        count = held.get(name)
        if count is None:
            return None
        key = self._identities[name][0]
        if count > 1:
            held[name] = count - 1
        else:
            del held[name]
            if not any(name in others for others in self._held.values()):
                del self._identities[name]
        return key

    def forget(self, adapter: str) -> Iterator[tuple[Tier, list[BlockKey]]]:
        """Forget the blocks of this adapter. Yields their keys in each tier, one for each copy. O(blocks)."""
        for name in [name for name, (*_, of) in self._evicted.items() if of == adapter]:
            del self._evicted[name]
        names = {name: key for name, (key, _, _, of) in self._identities.items() if of == adapter}
        for tier, held in self._held.items():
            yield tier, [key for name, key in names.items() for _ in range(held.pop(name, 0))]
        for name in names:
            del self._identities[name]

    def clear(self) -> None:
        """Forget every block."""
        for held in self._held.values():
            held.clear()
        self._identities.clear()
        self._evicted.clear()

    def blocks(self, group: int) -> Iterator[HeldElsewhere]:
        """Every block held, as blocks of this group."""
        for tier, held in self._held.items():
            if held:
                keys = Counter({self._identities[name][0]: 0 for name in held})
                for name, count in held.items():
                    keys[self._identities[name][0]] += count
                yield HeldElsewhere(tier, group, tuple(keys.elements()))

    def count(self, tier: Tier) -> int:
        """Blocks that this tier holds; those with the same hash count each."""
        return sum(self._held[tier].values())
