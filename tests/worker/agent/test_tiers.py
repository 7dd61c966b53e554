"""Blocks outside the GPU: published where their keys are certain, counted per tier, and forgotten when in doubt.

Not covered: what is dropped and why (`test_blocks.py`); how long a load takes (`test_load.py`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcache.feed import Cleared, Event, HeldElsewhere, Removed, Stored, Tier
from kvcache.keys import BlockKey, CacheScope, block_keys
from kvcache.tokens.tokenizer import Tokenizer
from tests.processes import eventually
from tests.worker.agent.beside import beside
from tests.worker.agent.captures import DATA
from tests.worker.agent.engine import CLEARED, packed, removed, stored
from worker.agent.core import tiers
from worker.agent.core.blocks import DropReason
from worker.agent.core.events import decode
from worker.agent.core.groups import EngineBlocks

SIZE = 2
PROMPTS = ((0, 10, CacheScope()), (100, 14, CacheScope("tenant")), (200, 6, CacheScope()))
"""First token, length and scope of each prompt in the file of vLLM's events."""
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
MEDIA = {"CPU": Tier.CPU, "CPU_PINNED": Tier.CPU, "cpu": Tier.CPU, "STORAGE": Tier.DISK, "FS": Tier.DISK}


def apply(blocks: EngineBlocks, *events: dict[str, Any]) -> list[Event]:
    return blocks.apply(decode(packed(*events)))


def copy_of(name: int, tokens: list[int], medium: str = "CPU", **fields: Any) -> dict[str, Any]:
    """As vLLM's offloading connector describes a block: without extra keys."""
    return stored([name], tokens, None if len(tokens) == SIZE else 0, medium=medium, **fields)


class TierMachine(RuleBasedStateMachine):
    """The events of an engine that copies, removes and clears in any order, beside a count of each (tier, block)."""

    @initialize()
    def start(self) -> None:
        self.blocks = EngineBlocks(SIZE)
        self.engine: dict[Tier, Counter[BlockKey]] = {tier: Counter() for tier in Tier}
        self.reader: dict[Tier, Counter[BlockKey]] = {tier: Counter() for tier in Tier}

    def send(self, event: dict[str, Any]) -> None:
        for change in apply(self.blocks, event):
            match change:
                case Stored(_, keys, tier):
                    self.reader[tier].update(keys)
                case Removed(keys, tier):
                    self.reader[tier].subtract(keys)
                    assert min(self.reader[tier].values()) >= 0
                case Cleared():
                    self.reader = {tier: Counter() for tier in Tier}

    @rule(path=PATHS)
    def compute(self, path: tuple[int, ...]) -> None:
        tokens = [token for token in path for _ in range(SIZE)]
        self.send(stored([hash(path[: at + 1]) for at in range(len(path))], tokens))
        self.engine[Tier.GPU].update(block_keys(tokens, SIZE))

    @rule(path=PATHS, medium=st.sampled_from(sorted(MEDIA)))
    def copy(self, path: tuple[int, ...], medium: str) -> None:
        key = block_keys([token for token in path for _ in range(SIZE)], SIZE)[-1]
        known = any(held[key] for held in self.engine.values())
        self.send(stored([hash(path)], [path[-1]] * SIZE, medium=medium, locality="LOCAL"))
        if known:  # otherwise it may have been evicted lately
            self.engine[MEDIA[medium]][key] += 1
        else:
            self.engine[MEDIA[medium]][key] = self.reader[MEDIA[medium]][key]

    @rule(path=PATHS, medium=st.sampled_from(["GPU", *sorted(MEDIA)]))
    def remove(self, path: tuple[int, ...], medium: str) -> None:
        tier = MEDIA.get(medium, Tier.GPU)
        key = block_keys([token for token in path for _ in range(SIZE)], SIZE)[-1]
        self.send(removed(hash(path), medium=medium, locality="LOCAL"))
        self.engine[tier] -= Counter([key])

    @rule()
    def clear(self) -> None:
        self.send(CLEARED)
        self.engine = {tier: Counter() for tier in Tier}

    @invariant()
    def what_was_published_is_what_is_listed_and_held(self) -> None:
        listed = {held.tier: Counter(held.keys) for held in self.blocks.elsewhere()}
        for tier in (Tier.CPU, Tier.DISK):
            assert +self.reader[tier] == +self.engine[tier] == listed.get(tier, Counter())
            assert self.blocks.held_below(tier) == self.engine[tier].total()
        assert Counter(key for key, _ in self.blocks.blocks()) == +self.reader[Tier.GPU]


TierMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestTiers = TierMachine.TestCase


def test_a_copy_has_the_key_of_its_hash_whatever_its_event_leaves_out() -> None:
    """vLLM's events of copies carry no salt: a key of their tokens alone would be that of everyone's prompt."""
    blocks = EngineBlocks(SIZE)
    apply(blocks, stored([1], [5, 6], extra_keys=[["tenant"]]))
    (key,) = block_keys([5, 6], SIZE, CacheScope("tenant"))
    assert apply(blocks, copy_of(1, [5, 6]), removed(1)) == [Stored(None, (key,), Tier.CPU), Removed((key,))]
    assert list(blocks.elsewhere()) == [HeldElsewhere(Tier.CPU, 0, (key,))]


def test_a_copy_that_is_reported_after_the_gpu_evicted_its_block_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "EVICTED_LATELY", 2)
    blocks = EngineBlocks(SIZE)
    apply(blocks, stored([1, 2, 3, 4], [1, 1, 2, 2, 3, 3, 4, 4]), copy_of(1, [1, 1]))
    apply(blocks, removed(4, 3, 2))
    keys = block_keys([1, 1, 2, 2, 3, 3, 4, 4], SIZE)
    changes = apply(blocks, copy_of(2, [2, 2]), copy_of(3, [3, 3]), copy_of(4, [4, 4]))
    assert changes == [Stored(keys[0], (keys[1], keys[2]), Tier.CPU)], "the one evicted first is forgotten"


def test_copies_of_consecutive_blocks_are_one_event() -> None:
    blocks = EngineBlocks(SIZE)
    apply(blocks, stored([1, 2, 3], [1, 1, 2, 2, 3, 3]))
    a, b, c = block_keys([1, 1, 2, 2, 3, 3], SIZE)
    changes = apply(blocks, *(copy_of(name, [name, name]) for name in (1, 2, 3)), removed(2, 1, medium="CPU"))
    assert changes == [Stored(None, (a, b, c), Tier.CPU), Removed((b, a), Tier.CPU)]


def test_blocks_of_an_adapter_are_forgotten_in_every_tier() -> None:
    """Those that the GPU evicted lately, too: no later copy of them may come back under the adapter's name."""
    blocks, adapter = EngineBlocks(SIZE), {"lora_id": 1, "lora_name": "sql"}
    apply(blocks, stored([1, 2], [1, 1, 2, 2], **adapter), stored([2], [2, 2], 1, **adapter), stored([3], [1, 1]))
    apply(blocks, *(copy_of(1, [1, 1], "CPU", **adapter) for _ in range(2)), copy_of(3, [1, 1]), removed(1))
    a, b = block_keys([1, 1, 2, 2], SIZE, CacheScope(adapter="sql"))
    assert blocks.forget("sql") == [Removed((b, b)), Removed((a, a), Tier.CPU)]
    (kept,) = block_keys([1, 1], SIZE)
    assert (list(blocks.blocks()), list(blocks.elsewhere())) == (
        [(kept, None)],
        [HeldElsewhere(Tier.CPU, 0, (kept,))],
    )
    assert blocks.forget("sql") == apply(blocks, copy_of(1, [1, 1], "CPU", **adapter)) == []


def test_a_disk_keeps_the_blocks_stored_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM never says that a file is gone, so their number has to be bounded."""
    monkeypatch.setattr(tiers, "DISK_BLOCKS", 2)
    blocks = EngineBlocks(SIZE)
    apply(blocks, stored([1, 2, 3], [1, 1, 2, 2, 3, 3]))
    a, b, c = block_keys([1, 1, 2, 2, 3, 3], SIZE)
    changes = apply(blocks, *(copy_of(name, [name, name], "FS", locality="LOCAL") for name in (1, 2, 3)))
    assert changes == [Stored(None, (a, b, c), Tier.DISK), Removed((a,), Tier.DISK)]
    assert list(blocks.elsewhere()) == [HeldElsewhere(Tier.DISK, 0, (b, c))]


def test_the_events_of_vllms_own_classes() -> None:
    """Made by vLLM 0.32's offloading manager and event tracker: copies of a salted prompt say nothing of the salt."""
    _, *lines = (DATA / "kv_events_offloading.txt").read_text().splitlines()
    plain, salted, third = (block_keys(list(range(at, at + length)), 4, scope) for at, length, scope in PROMPTS)
    blocks = EngineBlocks(4)
    first, second, last = (blocks.apply(decode(bytes.fromhex(line))) for line in lines)
    assert first == [Stored(None, tuple(plain)), Stored(None, tuple(plain), Tier.CPU)]
    assert second == [
        Stored(None, tuple(salted)),
        Removed((plain[1],), Tier.CPU),
        Stored(None, tuple(salted), Tier.CPU),
    ]
    assert last == [Removed(tuple(plain)), Removed((plain[0],), Tier.CPU)]
    assert blocks.dropped == {DropReason.UNIDENTIFIED: len(third)}, "the last prompt was never on the GPU"
    assert blocks.unknown_removals == 0


@pytest.mark.looptime(False)
async def test_the_view_beside_an_engine_has_what_its_tiers_hold(tokenizer: Tokenizer) -> None:
    """An emulated one over ZMQ, whose GPU evicts, which loads blocks back, and whose tier evicts, too."""
    sizes = {"blocks": 20, "max_model_len": 320, "cpu_blocks": 30}
    async with beside(tokenizer, 1, sizes) as run:
        await eventually(lambda: not run.agent.problem, "the agent follows")
        for at in (0, 1000, 2000, 0, 3000, 1000):
            await run.ask(0, range(at + 1, at + 201))
        await run.agrees(0)
        engine = run.worker.ranks[0].engine
        assert engine.stats.loaded_blocks > 0
        snapshot = await run.snapshot(0)
        assert [(copies.tier, len(copies.keys)) for copies in snapshot.elsewhere] == [(Tier.CPU, 30)]
        assert snapshot.info.tier_seconds.keys() == {Tier.CPU, Tier.DISK}
        assert 'kvcluster_agent_tier_blocks{tier="cpu"} 30.0' in (await run.client.get("/metrics")).text
