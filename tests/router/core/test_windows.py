"""How much of a prompt a cache of several groups serves: against the definition, length by length.

Not covered: what an engine with such a cache reports (tests/router/test_engine_shapes.py), and the same definition
against vLLM's own classes, which was compared when it was written (docs/vllm.md).
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvcache.feed import FULL_ATTENTION, SLIDING_WINDOW, CacheGroup, HeldElsewhere, Tier
from kvcache.keys import BlockKey, PrefixKeys, pack_tokens
from router.core.index import PrefixIndex
from router.core.windows import shapes
from tests.router.core.support import BLOCK, keys_of

LENGTH = 24
PROMPT = list(range(LENGTH * BLOCK + 1))
KEYS = keys_of(PROMPT)

groups = st.lists(
    st.builds(CacheGroup, st.just(FULL_ATTENTION), st.sampled_from([BLOCK, 2 * BLOCK]))
    | st.builds(
        CacheGroup, st.just(SLIDING_WINDOW), st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK]), st.integers(2, 9 * BLOCK)
    ),
    min_size=1,
    max_size=3,
)


def served(length: int, group: CacheGroup, held: set[BlockKey]) -> bool:
    """Whether the group serves a prefix of this many tokens: by the definition."""
    if length % group.block_size:
        return False
    blocks = length // group.block_size
    needed = -(-(group.window - 1) // group.block_size) if group.window else blocks
    ends = [(block + 1) * group.block_size for block in range(max(0, blocks - needed), blocks)]
    return all(KEYS[end // BLOCK - 1] in held for end in ends)


@given(groups, st.data(), st.integers(0, LENGTH))
def test_the_longest_prefix_that_every_group_serves(groups: list[CacheGroup], data: st.DataObject, limit: int) -> None:
    held: list[list[BlockKey]] = []
    for group in groups:
        keys = KEYS[group.block_size // BLOCK - 1 :: group.block_size // BLOCK]
        if group.window:
            missing = data.draw(st.sets(st.integers(0, len(keys) - 1), max_size=5))
            held.append([key for at, key in enumerate(keys) if at not in missing])
        else:
            held.append(keys[: data.draw(st.integers(0, len(keys)))])
    assumed_from = data.draw(st.integers(0, LENGTH))

    index = PrefixIndex()
    plain, slot = index.open(), index.open()
    index.store(plain, KEYS[:5])
    step = math.lcm(*(group.block_size for group in groups))
    index.set_shape(slot, step // BLOCK, shapes(groups, BLOCK))
    index.replace(slot, held[0], [HeldElsewhere(Tier.GPU, at, tuple(keys)) for at, keys in enumerate(held) if at])

    def found() -> int:
        depths = index.depths(PrefixKeys(pack_tokens(PROMPT), BLOCK), 0b11, limit)
        assert depths.get(plain, 0) == min(5, limit)
        return depths.get(slot, 0) * BLOCK

    def longest(held: list[set[BlockKey]]) -> int:
        lengths = range(limit * BLOCK // step * step, 0, -step)
        return next((n for n in lengths if all(map(served, [n] * len(groups), groups, held))), 0)

    stated = longest([set(keys) for keys in held])
    assert found() == stated
    search = PrefixKeys(pack_tokens(PROMPT), BLOCK)
    assert index.stated_depth(search, slot, limit) * BLOCK == stated

    above = assumed_from // index.stride(slot) * index.stride(slot)
    # What is full is prefix-closed, so what is assumed begins no deeper than what it holds.
    above = min([above, *(len(keys) * group.block_size // BLOCK for group, keys in zip(groups, held, strict=True))])
    above = above // index.stride(slot) * index.stride(slot)
    assumption = index.assume_prompt(slot, search, above)
    assert found() == longest([{*keys, *KEYS[above:]} for keys in held])
    index.withdraw(assumption)
    assert found() == stated


@pytest.mark.parametrize(("window", "lookups"), [(8 * BLOCK + 1, 1100), (64 * BLOCK + 1, 150)])
def test_a_search_in_vain_looks_at_one_block_for_each_window(
    window: int, lookups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the blocks of the sliding group is there."""
    prompt = list(range(8192 * BLOCK))
    index = PrefixIndex()
    slot = index.open()
    index.set_shape(
        slot, 1, shapes([CacheGroup(FULL_ATTENTION, BLOCK), CacheGroup(SLIDING_WINDOW, BLOCK, window)], BLOCK)
    )
    index.replace(slot, keys_of(prompt))
    counted = 0
    plain = PrefixKeys.between

    def between(self: PrefixKeys, above: int, end: int, stride: int = 1) -> object:
        nonlocal counted
        for key in plain(self, above, end, stride):
            counted += 1
            yield key

    monkeypatch.setattr(PrefixKeys, "between", between)
    assert index.depths(PrefixKeys(pack_tokens(prompt), BLOCK), 1 << slot, 8191) == {}
    assert counted <= lookups


def test_an_assumption_ends_when_the_sliding_group_evicts_the_block() -> None:
    index = PrefixIndex()
    slot = index.open()
    index.set_shape(
        slot, 1, shapes([CacheGroup(FULL_ATTENTION, BLOCK), CacheGroup(SLIDING_WINDOW, BLOCK, BLOCK)], BLOCK)
    )
    keys = PrefixKeys(pack_tokens(PROMPT), BLOCK)
    assumption = index.assume_prompt(slot, keys, 0)
    for group in (0, 1):
        index.store(slot, KEYS, Tier.GPU, group)
    index.remove(slot, KEYS[5:], Tier.GPU, group=1)
    assert index.depths(keys, 1 << slot, LENGTH) == {slot: 5}
    index.withdraw(assumption)
    assert index.depths(keys, 1 << slot, LENGTH) == {slot: 5}
    assert not index.assumed_blocks()
