"""What vLLM published in the captures, and which blocks are cached, computed from the decoded form of the captures
alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcache.keys import BlockKey, CacheScope, block_keys

DATA = Path(__file__).parents[2] / "data" / "vllm"
NAMES = ("kv_events_b16", "kv_events_small", "kv_events_cbor_bytes")
SIZE = 16


@dataclass(frozen=True)
class Captured:
    """One message. `events` are its decoded ones, hashes as JSON has them."""

    seq: int
    payload: bytes
    events: list[dict[str, Any]]


def messages(name: str) -> list[Captured]:
    lines = map(json.loads, (DATA / f"{name}.jsonl").read_text().splitlines())
    return [
        Captured(int(line["seq_hex"], 16), bytes.fromhex(line["payload_hex"]), line["decoded"][1]) for line in lines
    ]


@dataclass
class Model:
    """The cache as token sequences: it knows nothing of hash states or parents' keys."""

    held: Counter[Any] = field(default_factory=Counter)
    prefixes: dict[Any, tuple[CacheScope, tuple[int, ...]]] = field(default_factory=dict)

    def apply(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
            elif event["type"] == "BlockRemoved":
                self.held.subtract(event["block_hashes"])
                self.held = +self.held
            else:
                self._store(event)

    def _store(self, event: dict[str, Any]) -> None:
        extras = event["extra_keys"][0] or [""]
        scope, prefix = self.prefixes.get(event["parent_block_hash"], (CacheScope(salt=extras[0]), ()))
        for at, name in enumerate(event["block_hashes"]):
            prefix += tuple(event["token_ids"][at * SIZE : (at + 1) * SIZE])
            self.prefixes[name] = scope, prefix
            self.held[name] += 1

    def keys(self) -> Counter[BlockKey]:
        keys: Counter[BlockKey] = Counter()
        for name, count in self.held.items():
            scope, prefix = self.prefixes[name]
            keys[block_keys(prefix, SIZE, scope)[-1]] += count
        return keys


def cached(captured: Iterable[Captured]) -> Counter[BlockKey]:
    """Keys of every block that is cached after these messages, each physical one counted."""
    model = Model()
    for message in captured:
        model.apply(message.events)
    return model.keys()
