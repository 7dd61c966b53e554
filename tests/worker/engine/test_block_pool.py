"""The block pool beside a naive model of vLLM's rules 5-11, and each rule by itself.

Not covered: the cost of an operation (`bench/micro/engine.py`), and whether the rules are vLLM's (`test_captures.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.feed import Cleared, Removed, Stored
from kvcache.keys import DEFAULT_SCOPE
from worker.emulator.engine.block_pool import BlockPool, OutOfBlocksError
from worker.emulator.engine.events import BlocksStored, feed_events
from worker.emulator.engine.tokens import SequenceTokens


def key(*path: int) -> bytes:
    """Name of a block by its path from the root; children of different parents never share one."""
    return bytes(path)


def stored(keys: Iterable[bytes], parent: bytes | None = None) -> BlocksStored:
    """The run of these blocks; the pool does not look at their tokens."""
    return BlocksStored(tuple(keys), parent, SequenceTokens((), 1, DEFAULT_SCOPE), 0)


class NaiveCache:
    """Rules 5-11 written down as lists: O(n) everywhere, blocks are (serial, key) pairs."""

    def __init__(self, total: int) -> None:
        self.queue: list[list] = [[None] for _ in range(total)]  # free blocks; [key]
        self.cached: list[list] = []  # in the order of their storing
        self.refs: dict[int, int] = {}

    def find(self, name: bytes) -> list | None:
        return next((block for block in self.cached if block[0] == name), None)

    def allocate(self, count: int) -> tuple[list[list], list[bytes]]:
        taken, self.queue = self.queue[:count], self.queue[count:]
        evicted = [block[0] for block in taken if block[0] is not None]
        for block in taken:
            self.cached = [other for other in self.cached if other is not block]
            block[0] = None
            self.refs[id(block)] = 1
        return taken, evicted

    def acquire(self, block: list) -> None:
        self.queue = [other for other in self.queue if other is not block]
        self.refs[id(block)] = self.refs.get(id(block), 0) + 1

    def store(self, block: list, name: bytes) -> None:
        block[0] = name
        self.cached.append(block)

    def release(self, blocks: list[list]) -> None:
        for block in reversed(blocks):
            self.refs[id(block)] -= 1
            if not self.refs[id(block)]:
                self.queue = [*self.queue, block] if block[0] is not None else [block, *self.queue]


class Sequence:
    def __init__(self, path: tuple[int, ...]) -> None:
        self.path = path
        self.blocks: list[int] = []
        self.naive: list[list] = []


class BlockCacheMachine(RuleBasedStateMachine):
    """Sequences come, hit what they can, grow, fill their last block and end, in any order."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.cache = BlockPool(total)
        self.naive = NaiveCache(total)
        self.sequences: list[Sequence] = []
        self.replayed: Counter[bytes] = Counter()
        self.expected: list[tuple] = []

    # A sequence's blocks are those of the depths 1..n of a path; the last one may be not full yet.
    paths = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)

    @rule(path=paths, recompute_last=st.booleans())
    def arrive(self, path: tuple[int, ...], recompute_last: bool) -> None:
        keys = [key(*path[: depth + 1]) for depth in range(len(path))]
        if recompute_last:
            keys.pop()
        hits = self.cache.hits(iter(keys))
        naive = []
        for name in keys:
            block = self.naive.find(name)
            if block is None:
                break
            naive.append(block)
        assert len(hits) == len(naive)
        assert self.cache.in_use(hits) == sum(self.naive.refs.get(id(block), 0) > 0 for block in naive)
        sequence = Sequence(path)
        self.cache.acquire(hits)
        for block in naive:
            self.naive.acquire(block)
        sequence.blocks, sequence.naive = hits, naive
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 4), fill=st.booleans())
    def grow(self, data: st.DataObject, count: int, fill: bool) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        done = len(sequence.blocks)
        count = min(count, len(sequence.path) - done)
        if count < 1 or (done and sequence.naive[-1][0] is None):
            return
        if count > self.cache.free:
            with pytest.raises(OutOfBlocksError):
                self.cache.allocate(count)
            return
        blocks = self.cache.allocate(count)
        naive, evicted = self.naive.allocate(count)
        self.expected += [("removed", name) for name in evicted]
        sequence.blocks = [*sequence.blocks, *blocks]
        sequence.naive = [*sequence.naive, *naive]
        full = count if fill else count - 1
        if full:
            keys = [key(*sequence.path[: depth + 1]) for depth in range(done, done + full)]
            self.cache.store(blocks[:full], stored(keys, key(*sequence.path[:done]) if done else None))
            for block, name in zip(naive[:full], keys, strict=True):
                self.naive.store(block, name)
                self.expected.append(("stored", name))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.cache.release(sequence.blocks)
        self.naive.release(sequence.naive)

    @rule()
    def clear(self) -> None:
        cleared = self.cache.clear()
        assert cleared == (not self.sequences or not any(sequence.blocks for sequence in self.sequences))
        if cleared:
            for block in self.naive.cached:
                block[0] = None
            self.naive.cached = []
            # The order of empty blocks among themselves is not observable, but those at the left are used first.
            self.expected.append(("cleared", None))

    @rule()
    def take_events(self) -> None:
        seen: list[tuple] = []
        for event in feed_events(self.cache.take_events()):
            match event:
                case Stored(_, keys):
                    seen += [("stored", name) for name in keys]
                    self.replayed.update(keys)
                case Removed(keys):
                    seen += [("removed", name) for name in keys]
                    self.replayed.subtract(keys)
                case Cleared():
                    seen.append(("cleared", None))
                    self.replayed.clear()
        assert seen == self.expected
        self.expected = []
        assert +self.replayed == Counter(name for name, _ in self.cache.blocks())

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.free == len(self.naive.queue)
        used = {id(block) for sequence in self.sequences for block in sequence.naive}
        assert self.cache.free + len(used) == self.cache.total
        listed = self.cache.blocks()
        assert Counter(name for name, _ in listed) == Counter(block[0] for block in self.naive.cached)
        seen = set()
        for name, parent in listed:
            assert parent == (name[:-1] or None)
            assert parent is None or parent in seen  # prefix-closed, and parents come first
            seen.add(name)


TestAgainstModel = BlockCacheMachine.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def hold(cache: BlockPool, *keys: bytes) -> list[int]:
    blocks = cache.allocate(len(keys))
    cache.store(blocks, stored(keys))
    return blocks


def test_evicts_the_least_recently_used_sequence_tail_first() -> None:
    cache = BlockPool(4)
    cold, warm = hold(cache, b"c1", b"c2"), hold(cache, b"w1", b"w2")
    cache.release(warm)
    cache.release(cold)
    cache.acquire(cache.hits([b"w1", b"w2"]))
    cache.release(warm)
    cache.take_events()
    cache.allocate(4)
    assert feed_events(cache.take_events()) == [Removed((b"c2", b"c1", b"w2", b"w1"))]


def test_blocks_without_a_key_are_reused_before_cached_ones() -> None:
    cache = BlockPool(2)
    cached, empty = hold(cache, b"a"), cache.allocate(1)
    cache.release(cached)
    cache.release(empty)
    assert cache.allocate(1) == empty
    assert b"a" in cache.cached


def test_a_shared_block_is_freed_with_its_last_user() -> None:
    cache = BlockPool(2)
    blocks = hold(cache, b"a")
    cache.acquire(cache.hits([b"a"]))
    cache.release(blocks)
    assert (cache.free, cache.freed) == (1, 0)
    cache.release(blocks)
    assert (cache.free, cache.freed) == (2, 1)


def test_equal_keys_are_held_and_evicted_one_by_one() -> None:
    cache = BlockPool(3)
    copies = [hold(cache, b"a") for _ in range(3)]
    for copy in copies:
        cache.release(copy)
    assert cache.blocks() == [(b"a", None)] * 3
    assert cache.hits([b"a"]) == copies[0]
    cache.take_events()
    cache.allocate(2)
    assert feed_events(cache.take_events()) == [Removed((b"a", b"a"))]
    assert cache.blocks() == [(b"a", None)]
    assert cache.hits([b"a"]) == copies[2]


def test_a_lookup_reads_no_key_past_the_first_miss() -> None:
    cache = BlockPool(2)
    hold(cache, b"a")
    keys = iter([b"a", b"missing", b"never asked for"])
    assert len(cache.hits(keys)) == 1
    assert next(keys) == b"never asked for"


def test_taking_more_than_is_free_takes_none() -> None:
    cache = BlockPool(2)
    cache.allocate(1)
    with pytest.raises(OutOfBlocksError, match="2 blocks wanted, 1 of 2"):
        cache.allocate(2)
    assert cache.free == 1
