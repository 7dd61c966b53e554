"""The blocks of one engine: which are free, which are cached, and which is evicted next (vLLM rules 5-11).

Shape. A block is a number from `_BLOCKS` on. Its properties are in parallel lists: `_refs` (the number of sequences
that use it), `_key` and `_parent` (None while the block cannot be hit), `_next` and `_prev`. The last two form one
circular doubly linked list, the free queue, whose sentinel is the number `_END`. The blocks that were never taken are
one node of it, `_FRESH`, and not in the lists yet: a cache that is not full takes memory for what it has held alone.
`_first` maps a key to the oldest block that holds it, `_duplicates` to the later ones (rule 9: a recomputed block
becomes a second one with the same key).

Invariant. A block is in the free queue if and only if no sequence uses it. Allocation takes blocks from the left. From
there the queue holds blocks without a key, and then cached ones in the order of their release; of one sequence the last
block comes first. A sequence that hits a block takes all its ancestors out of the queue and returns them after it, so a
cached block always has a cached parent: the cache is prefix-closed.

The blocks of several KV-cache groups may share the pool (`sliding`); their keys name the group, as vLLM's do
(`group_key`). Only group 0 is prefix-closed then.

Rejected: an OrderedDict as the free queue. It is as fast for one block. But the common operations work on runs of
hundreds of blocks, for which the lists touch each link once and hash nothing, and a dictionary of 50,000 entries stops
for a rehash now and then. Also rejected: an object for each block, as in vLLM. The garbage collector would visit the
objects; it never visits numbers and bytes. Every operation here is O(1) for each block, whatever the size of the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, KeysView, Sequence
from functools import lru_cache
from itertools import groupby

from kvcache.keys import KEY_BYTES, BlockKey
from worker.emulator.engine.events import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent


def group_key(key: BlockKey, group: int) -> BlockKey:
    """The key of a block in a KV-cache group: in group 0 the key itself, in others it is longer by the group's
    number."""
    return key + group.to_bytes(1) if group else key


_END, _FRESH, _BLOCKS = range(3)
"""Numbers of nodes of the free queue: its sentinel, the blocks that were never taken, and the first block."""


@lru_cache(maxsize=8)
def _numbers(count: int) -> tuple[int, ...]:
    """The numbers below `count`: the lists of all pools of one size share these objects, which halves their memory."""
    return tuple(range(count))


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free. The caller must check `free` first, and preempt or wait."""


class BlockPool:
    """`total` blocks, all free and empty at first. Not thread-safe; called by the scheduler alone."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a cache has at least 1 usable block, not {total}")
        self.total = total
        self.free = total
        """Blocks that no sequence uses, cached or not."""
        self.freed = 0
        """Blocks ever returned to the free queue. A change tells a waiting scheduler that a new lookup may succeed."""
        self._numbers = _numbers(_BLOCKS + total)
        self._next = [_FRESH, _END]
        self._prev = [_FRESH, _END]
        self._refs = [0] * _BLOCKS
        self._key: list[BlockKey | None] = [None] * _BLOCKS
        self._parent: list[BlockKey | None] = [None] * _BLOCKS
        self._first: dict[BlockKey, int] = {}
        self._duplicates: dict[BlockKey, OrderedDict[int, None]] = {}
        self._events: list[CacheEvent] = []
        self._removed: list[BlockKey] = []
        """Evictions since the last event in `_events`."""
        self._grouped = False
        """Whether blocks of other groups than 0 have been stored."""

    @property
    def cached(self) -> KeysView[BlockKey]:
        """The keys that can be hit: a live view."""
        return self._first.keys()

    def hits(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`, which is read no further than one key past it. The blocks
        are not acquired: see `acquire`."""
        found: list[int] = []
        for block in map(self._first.get, keys):
            if block is None:
                break
            found.append(block)
        return found

    def in_use(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in use: acquiring these takes no free block (rule 13)."""
        return sum(map(bool, map(self._refs.__getitem__, blocks)))

    def acquire(self, blocks: Iterable[int]) -> None:
        """Count one more sequence as a user of these cached blocks. Free ones leave the free queue (rule 10). No
        event."""
        refs, nxt, prv = self._refs, self._next, self._prev
        for block in blocks:
            if not refs[block]:
                after, before = nxt[block], prv[block]
                nxt[before] = after
                prv[after] = before
                self.free -= 1
            refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks from the left of the free queue for one sequence, and evict what they hold (rule 11).

        Raises `OutOfBlocksError`, having taken none.
        """
        if count > self.free:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.free} of {self.total} are free")
        refs, nxt, key, parent = self._refs, self._next, self._key, self._parent
        first, duplicates, removed = self._first, self._duplicates, self._removed
        taken: list[int] = []
        block, wanted = nxt[_END], count
        while wanted:
            if block == _FRESH:
                fresh = self._take_fresh(wanted)
                taken += fresh
                wanted -= len(fresh)
                if len(refs) == len(self._numbers):
                    block = nxt[_FRESH]
                continue
            held = key[block]
            if held is not None:
                if duplicates and held in duplicates:
                    self._evict_one(block, held, duplicates[held])
                else:
                    del first[held]
                key[block] = parent[block] = None
                removed.append(held)
            refs[block] = 1
            taken.append(block)
            wanted -= 1
            block = nxt[block]
        nxt[_END] = block
        self._prev[block] = _END
        self.free -= count
        return taken

    def _take_fresh(self, wanted: int) -> tuple[int, ...]:
        """Up to `wanted` of the blocks that were never taken."""
        begin = len(self._refs)
        fresh = self._numbers[begin : begin + wanted]
        count = len(fresh)
        self._refs += [1] * count
        for links in (self._next, self._prev):
            links += [_END] * count
        for keys in (self._key, self._parent):
            keys += [None] * count
        return fresh

    def store(self, blocks: Sequence[int], stored: BlocksStored) -> None:
        """Make `blocks`, which the caller uses and which are full, available for hits under the keys of `stored`, which
        becomes an event."""
        first, keys, above = self._first, stored.keys, stored.parent
        if stored.group:
            self._grouped = True
            keys = tuple(group_key(key, stored.group) for key in keys)
        key_of, parent_of, holder = self._key, self._parent, first.setdefault
        for block, key in zip(blocks, keys, strict=True):
            key_of[block] = key
            parent_of[block] = above
            if holder(key, block) != block:
                self._duplicates.setdefault(key, OrderedDict())[block] = None
            above = key
        self._flush_removed()
        self._events.append(stored)

    def release(self, blocks: Sequence[int]) -> None:
        """Count one sequence less as a user of `blocks`, given in the order of the sequence. Blocks without a user
        enter the free queue in reverse: cached ones at the right, so the tail is evicted before the head, others at the
        left."""
        refs, nxt, prv, key, end = self._refs, self._next, self._prev, self._key, _END
        right = prv[end]
        freed = 0
        for block in reversed(blocks):
            left = refs[block] - 1
            refs[block] = left
            if left:
                continue
            freed += 1
            if key[block] is not None:
                nxt[right] = block
                prv[block] = right
                right = block
            else:
                head = nxt[end]
                nxt[end] = block
                prv[block] = end
                nxt[block] = head
                prv[head] = block
                if head == end:  # the queue was empty
                    right = block
        nxt[right] = end
        prv[end] = right
        self.free += freed
        self.freed += freed

    def clear(self) -> bool:
        """Drop every cached block. False, with nothing done, while a sequence uses any block."""
        if self.free != self.total:
            return False
        self._key = [None] * len(self._key)
        self._parent = [None] * len(self._parent)
        self._first.clear()
        self._duplicates.clear()
        self._flush_removed()
        self._events.append(CacheCleared())
        return True

    def blocks(self) -> list[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every cached block of group 0, parents first. A key appears once for each block that
        holds it."""
        # A key enters `_first` before its children and stays there as long as they do (the cache is prefix-closed),
        # so parents come first in that dictionary.
        pairs = []
        for key, block in self._first.items():
            if _group(key):
                continue
            pair = (key, self._parent[block])
            pairs.append(pair)
            if key in self._duplicates:
                pairs.extend([pair] * len(self._duplicates[key]))
        return pairs

    def keys_of_group(self, group: int) -> list[BlockKey]:
        """The cached keys of another group than 0, each once for each block that holds it."""
        found: list[BlockKey] = []
        for key in self._first:
            if _group(key) == group:
                found.extend([key[:-1]] * (1 + len(self._duplicates.get(key, ()))))
        return found

    def take_events(self) -> list[CacheEvent]:
        """The changes since the last call, in order. Consecutive evictions are one event."""
        self._flush_removed()
        events, self._events = self._events, []
        return events

    def _evict_one(self, block: int, key: BlockKey, later: OrderedDict[int, None]) -> None:
        """Evict one of several blocks that hold a key: the oldest one, or one of the `later` ones."""
        if self._first[key] == block:
            self._first[key], _ = later.popitem(last=False)
        else:
            del later[block]
        if not later:
            del self._duplicates[key]

    def _flush_removed(self) -> None:
        if not self._removed:
            return
        removed, self._removed = self._removed, []
        if not self._grouped:
            self._events.append(BlocksRemoved(tuple(removed)))
            return
        for group, keys in groupby(removed, _group):
            self._events.append(BlocksRemoved(tuple(key[:KEY_BYTES] for key in keys), group=group))


def _group(key: BlockKey) -> int:
    """Inverse of `group_key`, as far as the group goes."""
    return key[-1] if len(key) > KEY_BYTES else 0
