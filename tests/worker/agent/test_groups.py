"""Engines with several KV-cache groups: what is published of each, and what is stated of the groups.

The blocks and removals are those of an emulated engine, by way of vLLM's own format. Not covered: what a group holds by
itself (test_blocks.py), slower tiers (test_tiers.py), how routers search groups (tests/router/core/test_windows.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import FULL_ATTENTION, SLIDING_WINDOW, CacheGroup, Event, Removed, Stored
from kvcache.keys import BlockKey, block_keys
from kvcache.profiles import LatencyModel
from tests.worker.agent.engine import CLEARED, packed, removed, stored
from worker.agent.core.blocks import DropReason
from worker.agent.core.events import decode
from worker.agent.core.groups import EngineBlocks
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import EngineRequest
from worker.emulator.kv_events.encoding import CacheGroup as Spec
from worker.emulator.kv_events.encoding import VllmEvents
from worker.kv_events import WireFormat

SIZE = 2
SLIDING = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 5}
FULL = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


def applied(blocks: EngineBlocks, *events: dict[str, Any]) -> list[Event]:
    return blocks.apply(decode(packed(*events)))


def held(blocks: EngineBlocks, group: int) -> Counter[BlockKey]:
    if not group:
        return Counter(key for key, _ in blocks.blocks())
    return Counter(key for place in blocks.elsewhere() if place.group == group for key in place.keys)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        pytest.param([{}], (), id="an old engine"),
        pytest.param([FULL], (), id="full attention alone"),
        pytest.param([{**FULL, "kv_cache_spec_kind": "mla_attention"}], (), id="MLA alone"),
        pytest.param(
            [FULL, SLIDING],
            (CacheGroup(FULL_ATTENTION, SIZE), CacheGroup(SLIDING_WINDOW, SIZE, 5)),
            id="full and sliding",
        ),
        pytest.param([{**SLIDING, "group_idx": 0}], (CacheGroup(SLIDING_WINDOW, SIZE, 5),), id="sliding alone"),
        pytest.param([SLIDING], (CacheGroup("unknown", 1), CacheGroup(SLIDING_WINDOW, SIZE, 5)), id="one not seen yet"),
        pytest.param(
            [FULL, {"group_idx": 1, "kv_cache_spec_kind": "mamba"}],
            (CacheGroup(FULL_ATTENTION, SIZE), CacheGroup("mamba", SIZE)),
            id="full and Mamba",
        ),
    ],
)
def test_what_is_stated_of_the_groups(fields: list[dict[str, Any]], groups: tuple[CacheGroup, ...]) -> None:
    blocks = EngineBlocks(SIZE)
    applied(blocks, *(stored([1], [5, 6], **each) for each in fields))
    assert (blocks.groups, blocks.block_size) == (groups, SIZE)
    applied(blocks, CLEARED)
    assert blocks.groups == groups, "the engine is the same"
    blocks.clear()
    assert blocks.groups == ()


def test_groups_with_longer_blocks() -> None:
    blocks = EngineBlocks(SIZE)
    applied(blocks, stored([1, 2, 3], [5, 6, 7, 8, 9, 9], **FULL), stored([9], [5, 6, 7, 8, 9, 9], **SLIDING))
    assert blocks.block_size == 3 * SIZE
    assert held(blocks, 1) == Counter(block_keys([5, 6, 7, 8, 9, 9], 3 * SIZE))


def test_a_parent_may_be_held_by_another_group_alone() -> None:
    blocks = EngineBlocks(SIZE)
    run = ([1, 2], [5, 6, 7, 8])
    applied(blocks, stored(*run, **FULL), stored(*run, **SLIDING), removed(1, group_idx=1), removed(2, group_idx=1))
    changes = applied(blocks, stored([3], [9, 9], 2, **SLIDING))
    keys = block_keys([5, 6, 7, 8, 9, 9], SIZE)
    assert changes == [Stored(keys[1], (keys[2],), group=1)]
    assert applied(blocks, removed(1, group_idx=0), removed(3, group_idx=1), removed(3, group_idx=0)) == [
        Removed((keys[0],)),
        Removed((keys[2],), group=1),
    ]
    assert blocks.unknown_removals == 1


def test_blocks_that_a_sliding_group_leaves_out() -> None:
    """The event has the tokens of all three blocks and the hashes of two; the full group's may come after it."""
    blocks = EngineBlocks(SIZE)
    tokens = [5, 6, 7, 8, 9, 9]
    changes = applied(
        blocks, {**stored([2, 3], tokens, **SLIDING), "block_size": SIZE}, stored([1, 2, 3], tokens, **FULL)
    )
    keys = block_keys(tokens, SIZE)
    assert changes == [Stored(None, tuple(keys)), Stored(keys[0], (keys[1], keys[2]), group=1)]
    applied(blocks, {**stored([8], [1, 1, 2, 2], **SLIDING), "block_size": SIZE})
    assert blocks.dropped == {DropReason.UNREADABLE: 1}, "what no other group holds is not known"


class Nines:
    def token(self, index: int) -> int:
        return 9


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=20),
    st.integers(1, 30),
    st.integers(1, 2),
    st.sampled_from([8, 64]),
)
@settings(max_examples=20, deadline=None)
def test_the_blocks_of_an_emulated_engine(
    requests: list[tuple[int, int, int]], window: int, sliding: int, budget: int
) -> None:
    config = EngineConfig(80, budget, 4, 80, block_size=4, sliding_window=window, sliding_groups=sliding)
    engine = Engine(config, LatencyModel(1.0, 1.0, 1.0, 1.0))
    wire = VllmEvents(WireFormat.MAP, {}, [Spec(), *[Spec("sliding_window", window)] * sliding])
    blocks, published = EngineBlocks(4), [Counter[BlockKey]() for _ in range(sliding + 1)]
    for number, (family, length, output) in enumerate(requests):
        engine.submit(EngineRequest(str(number), [family * 100 + at for at in range(length)], output, Nines()), 0.0)
    while (due := engine.next_event()) is not None:
        engine.advance(due)
        for event in blocks.apply(decode(wire.payload(engine.take_events(), 0.0, 0))):
            match event:
                case Stored(_, keys, _, group):
                    published[group].update(keys)
                case Removed(keys, _, group):
                    published[group].subtract(keys)
        assert published[0] == Counter(key for key, _ in engine.blocks()) == held(blocks, 0)
        for place in engine.elsewhere():
            assert Counter(place.keys) == +published[place.group] == held(blocks, place.group)
    assert not blocks.dropped
    assert blocks.unknown_removals == 0
    assert blocks.groups in ((), config.groups)
