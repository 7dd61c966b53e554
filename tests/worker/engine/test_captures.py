"""The engine beside a real vLLM: the same requests cause the same KV events, batch by batch and in the same order.

Each file holds what a vLLM 0.32.0 with 40 usable blocks of 16 tokens and 64 batched tokens published. Its hashes are
opaque here, so both sides are compared by the token prefix that a block stands for.

Not covered: the times of steps, preemption, and other sizes than those of the captures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.feed import Event, Stored
from kvcache.keys import BlockKey, block_keys
from tests.worker.engine.conftest import make_engine
from worker.emulator.engine.events import feed_events

DATA = Path(__file__).parents[2] / "data" / "vllm"
SIZE = 16

Change = tuple[str, BlockKey | None, tuple[BlockKey, ...]]


class Capture:
    """Captured batches with our keys in the place of vLLM's hashes."""

    def __init__(self, name: str) -> None:
        self.prefix: dict[int, tuple[int, ...]] = {}
        """Tokens from the start of the prompt to the end of a block, by vLLM's hash."""
        self.batches: list[list[Change]] = []
        for events in json.loads((DATA / name).read_text())["batches"]:
            changes = [self._change(event) for event in events if event["type"] != "AllBlocksCleared"]
            self.batches.append(changes)

    def _change(self, event: dict) -> Change:
        if event["type"] == "BlockRemoved":
            return "removed", None, tuple(self.key(block) for block in event["blocks"])
        prefix = self.prefix.get(event["parent"], ())
        for i, block in enumerate(event["blocks"]):
            prefix += tuple(event["token_ids"][i * SIZE : (i + 1) * SIZE])
            self.prefix[block] = prefix
        parent = self.key(event["parent"]) if event["parent"] is not None else None
        return "stored", parent, tuple(self.key(block) for block in event["blocks"])

    def key(self, block: int) -> BlockKey:
        return block_keys(self.prefix[block], SIZE)[-1]

    def prompt(self, first_token: int, length: int) -> list[int]:
        """The prompt that began with `first_token`; what no full block told of its tail is made up."""
        longest = max((p for p in self.prefix.values() if p[0] == first_token), key=len)
        return [*longest, *range(3000, 3000 + length)][:length]


def changes_of(events: list[Event]) -> list[Change]:
    """vLLM's granularity: one event for each removed block."""
    changes: list[Change] = []
    for event in events:
        if isinstance(event, Stored):
            changes.append(("stored", event.parent, event.keys))
        else:
            changes += [("removed", None, (key,)) for key in event.keys]
    return changes


@pytest.fixture
def replay(request_of: Callable) -> Callable[..., list[list[Change]]]:
    """Batches that groups of (prompt, output) cause; a group is sent when the one before is done."""

    def run(groups: list[list[tuple[list[int], list[int]]]]) -> list[list[Change]]:
        emulated = make_engine(blocks=40, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=512)
        batches = []
        now = 0.0
        for group in groups:
            for prompt, output in group:
                emulated.submit(request_of(prompt, len(output), output), now)
            while (at := emulated.next_event()) is not None:
                emulated.advance(now := at)
                batches.append(changes_of(feed_events(emulated.take_events())))
        return [batch for batch in batches if batch]

    return run


def test_preempts_and_recomputes_like_vllm(replay: Callable) -> None:
    """Rules 6, 7, 10-14: four sequences outgrow the cache; two are preempted, and come back through the cache."""
    capture = Capture("kv_events_preemption.json")
    prompts = [capture.prompt(first, 300) for first in (1770, 2779, 3788, 1197)]
    assert replay([[(tokens[:100], tokens[100:]) for tokens in prompts]]) == capture.batches


def test_evicts_like_vllm(replay: Callable) -> None:
    """Rules 8, 10 and 11: blocks without a key go first, then the least recently used, the tail before the head."""
    capture = Capture("kv_events_eviction.json")
    first = capture.prompt(1309, 160)
    prompts = [
        first,
        *(capture.prompt(token, 160) for token in (2318, 3327, 736)),
        capture.prompt(1745, 40),
        capture.prompt(2754, 20),
        first[:90],  # a hit: no event, but it keeps the first five blocks
        capture.prompt(3763, 320),
        first,
    ]
    assert replay([[(prompt, [7])] for prompt in prompts]) == capture.batches


def test_duplicates_like_vllm(replay: Callable) -> None:
    """Rules 8 and 9: a recomputed last block is stored again, and each of the copies is evicted by itself."""
    capture = Capture("kv_events_duplicates.json")
    short, shared = capture.prompt(2480, 80), capture.prompt(3489, 96)
    batches = replay(
        [
            [(short, [7])],
            [(short, [7])],
            [(shared, [7])] * 3,
            [(capture.prompt(898, 500), [7])],
            [(capture.prompt(1907, 130), [7])],
            [(short, [7])],
            [(shared, [7])],
        ]
    )
    assert batches == capture.batches
