"""The index against a naive model: a multiset of prefixes for each worker.

Not covered: how long its operations take (`python -m bench.micro.index`), apart from the number of keys that a search
looks up.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvcache.feed import HeldElsewhere, Tier
from kvcache.keys import BlockKey, PrefixKeys, pack_tokens
from router.core.index import Assumption, PrefixIndex
from tests.router.core.support import BLOCK, keys_of

Prompt = tuple[int, ...]


def prompt_of(path: Prompt) -> list[int]:
    """A prompt whose blocks are named by `path`, with one token more."""
    return [token for block in path for token in (block, 0, 0, 0)] + [9]


def search(path: Prompt) -> PrefixKeys:
    return PrefixKeys(pack_tokens(prompt_of(path)), BLOCK)


SLOWER = (Tier.CPU, Tier.DISK)
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_its_memory_is_estimated_within_10_percent(slots: int) -> None:
    """Of caches that overlap by a half, as feeds bring them: each key an object of its own."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        index = PrefixIndex()
        for number in range(slots):
            slot = index.open()
            first = 40_000 // slots * number // 2
            keys = [key.to_bytes(16, "big") for key in range(first, first + 40_000 // slots)]
            index.store(slot, keys)
            if number % 4 == 3:
                index.remove(slot, keys[: len(keys) // 2])
            del keys
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert index.memory() == pytest.approx(taken, rel=0.1)


class IndexMachine(RuleBasedStateMachine):
    """Stores and removes whole runs as an engine does, so that caches stay prefix-closed: a run is stored from its
    start, and what is removed is a deepest block. The slower tiers store and remove any blocks."""

    slots: Bundle[int] = Bundle("slots")
    assumptions: Bundle[tuple[int, int, Assumption]] = Bundle("assumptions")

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex()
        self.stored: dict[int, Counter[BlockKey]] = {}
        self.slower: dict[tuple[int, Tier], Counter[BlockKey]] = {}
        self.assumed: dict[int, Counter[BlockKey]] = {}
        self.pending: dict[int, dict[int, list[BlockKey]]] = {}
        self.strides: dict[int, int] = {}
        self.paths: set[Prompt] = set()
        self.number = 0

    def keys(self, slot: int, path: Prompt) -> list[BlockKey]:
        """Those of the prompt that an engine with the slot's block size has."""
        stride = self.strides[slot]
        return keys_of(prompt_of(path))[stride - 1 :: stride]

    @rule(target=slots, stride=st.sampled_from([0, 0, 1, 2, 3]))
    def open(self, stride: int) -> int:
        """Stride 0: the worker never states a block size."""
        slot = self.index.open()
        assert slot not in self.stored, "a slot in use was handed out"
        assert slot <= len(self.stored), "masks stay as narrow as the fleet"
        self.stored[slot], self.strides[slot] = Counter(), stride or 1
        self.assumed[slot], self.pending[slot] = Counter(), {}
        self.slower.update(((slot, tier), Counter()) for tier in SLOWER)
        if stride:
            self.index.set_shape(slot, stride)
        assert self.index.stride(slot) == self.strides[slot]
        return slot

    @rule(slot=consumes(slots))
    def drop(self, slot: int) -> None:
        self.index.drop(slot)
        del self.stored[slot], self.assumed[slot]
        for tier in SLOWER:
            del self.slower[slot, tier]

    @rule(slot=slots, path=PATHS)
    def store(self, slot: int, path: Prompt) -> None:
        keys = self.keys(slot, path)
        self.paths.add(path)
        self.index.store(slot, keys)
        self.stored[slot].update(keys)

    @rule(slot=slots, data=st.data())
    def remove_deepest(self, slot: int, data: st.DataObject) -> None:
        held = self.stored[slot]
        runs = [[key for key in self.keys(slot, path) if held[key]] for path in sorted(self.paths)]
        inner = {key for run in runs for key in run[:-1]}
        leaves = [run[-1] for run in runs if run and run[-1] not in inner]
        if not leaves:
            return
        key = data.draw(st.sampled_from(leaves))
        assert self.index.remove(slot, [key]) == 0
        self.stored[slot] = +(held - Counter([key]))
        if key not in self.stored[slot]:
            del self.assumed[slot][key]

    @rule(slot=slots)
    def clear(self, slot: int) -> None:
        self.index.clear(slot)
        self.stored[slot], self.assumed[slot], self.pending[slot] = Counter(), Counter(), {}
        self.slower.update(((slot, tier), Counter()) for tier in SLOWER)

    @rule(slot=slots, tier=st.sampled_from(SLOWER), path=PATHS, first=st.integers(0, 8))
    def store_elsewhere(self, slot: int, tier: Tier, path: Prompt, first: int) -> None:
        keys = self.keys(slot, path)[first:]
        self.paths.add(path)
        self.index.store(slot, keys, tier)
        self.slower[slot, tier].update(keys)

    @rule(slot=slots, tier=st.sampled_from(SLOWER), path=PATHS)
    def remove_elsewhere(self, slot: int, tier: Tier, path: Prompt) -> None:
        key = keys_of(prompt_of(path))[-1]
        held = self.slower[slot, tier]
        assert self.index.remove(slot, [key], tier) == (held[key] == 0)
        self.slower[slot, tier] = held - Counter([key])

    @rule(slot=slots, paths=st.lists(PATHS, max_size=4), slower=st.dictionaries(st.sampled_from(SLOWER), PATHS))
    def replace(self, slot: int, paths: list[Prompt], slower: dict[Tier, Prompt]) -> None:
        keys = [key for path in paths for key in self.keys(slot, path)]
        self.paths.update(paths)
        elsewhere = {tier: self.keys(slot, path) for tier, path in slower.items()}
        self.index.replace(slot, keys, [HeldElsewhere(tier, 0, tuple(held)) for tier, held in elsewhere.items()])
        self.stored[slot] = Counter(keys)
        for tier in SLOWER:
            self.slower[slot, tier] = Counter(elsewhere.get(tier, ()))

    @rule(target=assumptions, slot=slots, path=PATHS)
    def assume(self, slot: int, path: Prompt) -> tuple[int, int, Assumption]:
        keys = self.keys(slot, path)
        self.paths.add(path)
        self.number += 1
        self.assumed[slot].update(keys)
        self.pending[slot][self.number] = keys
        return slot, self.number, self.index.assume(slot, keys)

    @rule(assumption=assumptions)
    def withdraw(self, assumption: tuple[int, int, Assumption]) -> None:
        """Any number of times, and after the slot was cleared, dropped or given to another worker."""
        slot, number, held = assumption
        self.index.withdraw(held)
        if slot in self.assumed:
            self.assumed[slot] -= Counter(self.pending[slot].pop(number, []))

    @rule(target=slots, slot=consumes(slots), stride=st.sampled_from([0, 1, 2]))
    def restart(self, slot: int, stride: int) -> int:
        self.drop(slot)
        return self.open(stride)

    @rule(target=slots)
    def nothing(self) -> object:
        return multiple()

    @invariant()
    def every_multiset_is_exact(self) -> None:
        for slot, held in self.stored.items():
            assert self.index.held(slot) == held
            assert self.index.blocks(slot) == held.total()
        for (slot, tier), held in self.slower.items():
            assert self.index.held(slot, tier) == held
            assert self.index.blocks(slot, tier) == held.total()
        assert len(self.index) == len(set().union(*self.stored.values()))
        assumed = {key for keys in self.assumed.values() for key in keys}
        assert self.index.assumed_blocks() == len(assumed)

    @rule(path=PATHS, among=st.integers(0, 2**6 - 1), limit=st.integers(0, 9))
    def depths_are_the_longest_contiguous_matches(self, path: Prompt, among: int, limit: int) -> None:
        limit = min(limit, len(path))
        expected = {}
        for slot, held in self.stored.items():
            present, stride = set(held) | set(self.assumed[slot]), self.strides[slot]
            keys = self.keys(slot, path)[: limit // stride]
            depth = next((at for at, key in enumerate(keys) if key not in present), len(keys))
            if among >> slot & 1 and depth:
                expected[slot] = depth * stride
        assert self.index.depths(search(path), among, limit) == expected

    @rule(path=PATHS, starts=st.dictionaries(st.integers(0, 5), st.integers(0, 9)), limit=st.integers(0, 9))
    def loads_are_unbroken_runs_above_the_start(self, path: Prompt, starts: dict[int, int], limit: int) -> None:
        limit = min(limit, len(path))
        starts = {
            slot: depth // self.strides[slot] * self.strides[slot]
            for slot, depth in starts.items()
            if slot in self.stored
        }
        expected: dict[int, Counter[Tier]] = {}
        for slot, start in starts.items():
            stride = self.strides[slot]
            for key in self.keys(slot, path)[start // stride : limit // stride]:
                tier = next((tier for tier in SLOWER if self.slower[slot, tier][key]), None)
                if tier is None:
                    break
                expected.setdefault(slot, Counter())[tier] += stride
        assert self.index.loads(search(path), starts, limit) == expected

    @rule(slot=slots, path=PATHS)
    def stated_depth_leaves_assumptions_out(self, slot: int, path: Prompt) -> None:
        keys = self.keys(slot, path)
        depth = next((at for at, key in enumerate(keys) if not self.stored[slot][key]), len(keys))
        assert self.index.stated_depth(search(path), slot, len(path)) == depth * self.strides[slot]


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestIndex = IndexMachine.TestCase


def test_a_key_stored_k_times_is_held_until_it_is_removed_k_times() -> None:
    index = PrefixIndex()
    slot = index.open()
    keys = keys_of(prompt_of((1, 2)))
    index.store(slot, [*keys, keys[1], keys[1]])
    assert index.remove(slot, [keys[1], keys[1]]) == 0
    assert index.depths(search((1, 2)), 1 << slot, 2) == {slot: 2}
    assert index.remove(slot, [keys[1]]) == 0
    assert index.depths(search((1, 2)), 1 << slot, 2) == {slot: 1}
    assert index.remove(slot, [keys[1]]) == 1, "a removal of what is not held is counted, and changes nothing"
    assert index.held(slot) == Counter(keys[:1])


def test_a_slot_that_is_used_again_knows_nothing_of_the_worker_before() -> None:
    index = PrefixIndex()
    first, other = index.open(), index.open()
    keys = keys_of(prompt_of((1, 2)))
    index.store(first, keys)
    stale = index.assume(first, keys)
    index.drop(first)
    assert index.open() == first
    fresh = index.assume(first, keys)
    index.withdraw(stale)
    assert index.depths(search((1, 2)), 0b11, 2) == {first: 2}, "ending the old worker's assumption ends no other"
    index.withdraw(fresh)
    assert index.depths(search((1, 2)), 0b11, 2) == {}
    assert other == 1


@given(st.integers(1, 600), st.lists(st.integers(0, 600), min_size=1, max_size=70))
def test_any_depths_of_any_number_of_workers_are_found(length: int, depths: list[int]) -> None:
    index = PrefixIndex()
    prompt = list(range(length * BLOCK))
    keys = keys_of(prompt)
    for depth in depths:
        index.store(index.open(), keys[:depth])
    found = index.depths(PrefixKeys(pack_tokens(prompt), BLOCK), (1 << len(depths)) - 1, length)
    assert found == {slot: min(depth, length) for slot, depth in enumerate(depths) if depth}


@pytest.mark.parametrize("matched", [0, 1, 100, 4000, 8192])
def test_a_search_probes_about_twice_the_logarithm_of_the_depth(matched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(8192 * BLOCK))
    index = PrefixIndex()
    index.store(index.open(), keys_of(prompt)[:matched])
    probed: set[int] = set()
    plain = PrefixKeys.key

    def counting(self: PrefixKeys, depth: int) -> BlockKey:
        probed.add(depth)
        return plain(self, depth)

    monkeypatch.setattr(PrefixKeys, "key", counting)
    assert index.depths(PrefixKeys(pack_tokens(prompt), BLOCK), 1, 8192) == ({0: matched} if matched else {})
    assert len(probed) <= 2 * max(1, matched).bit_length() + 1
    assert max(probed) <= max(1, 2 * matched), "nothing is hashed far beyond the match"


def test_a_run_of_loads_hashes_each_block_once() -> None:
    """Two workers hold different starts of a prompt on their GPUs and the rest elsewhere."""
    prompt = list(range(4000 * BLOCK))
    keys = keys_of(prompt)
    index = PrefixIndex()
    for held in (10, 2000):
        slot = index.open()
        index.store(slot, keys[:held])
        index.store(slot, keys[held:], Tier.CPU)
    probed: list[int] = []

    class Counting(PrefixKeys):
        def key(self, depth: int) -> BlockKey:
            probed.append(depth)
            return super().key(depth)

    counting = Counting(pack_tokens(prompt), BLOCK)
    starts = index.depths(counting, 0b11, 4000)
    before = len(probed)
    assert index.loads(counting, starts, 4000) == {0: {Tier.CPU: 3990}, 1: {Tier.CPU: 2000}}
    assert len(probed) - before <= 1, "the keys of a run follow from one another"
