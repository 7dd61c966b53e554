"""Makes vLLM's KV events of the emulated engine's: its block hashes, its fields, its two wire formats.

Checked against captures of a running vLLM 0.32 (`tests/worker/test_kv_events.py`): a batch has the same bytes. Not
modelled: the hashes `sha256_cbor` and `xxhash`, hashes as 32 bytes (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`),
`session_id`, `locality` and `ownership`, events of prefix hits (`kv_cache_report_mode`), and prompts given as
embeddings.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from kvcache.feed import Tier
from kvcache.keys import BlockKey
from worker.emulator.adapters import Adapter
from worker.emulator.engine.events import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from worker.emulator.engine.tokens import SequenceTokens
from worker.kv_events import WireFormat

MEDIA = {Tier.GPU: "GPU", Tier.CPU: "CPU", Tier.DISK: "STORAGE"}
"""vLLM's names of the tiers (`vllm/distributed/kv_events.py`)."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """The kind of attention of one KV-cache group."""

    kind: str = "full_attention"
    sliding_window: int | None = None


def block_hash(value: object) -> bytes:
    """vLLM's hash `sha256`, its default: of the pickle of `value` (`vllm/utils/hashing.py`)."""
    return hashlib.sha256(pickle.dumps(value, protocol=5)).digest()


DEFAULT_SEED = "vllm-none-hash"
"""Of which the parent of a prompt's first block is the hash, unless PYTHONHASHSEED is set (vLLM rule 2)."""


class VllmEvents:
    """Translates the changes of one engine's cache, all of them and in order.

    A hash chains the hash before it, so the hashes of the blocks that the engine holds are kept: some 200 bytes each.
    `adapters` are those that were ever loaded, by name; it may change.
    """

    def __init__(
        self,
        wire_format: WireFormat,
        adapters: Mapping[str, Adapter],
        groups: Sequence[CacheGroup] = (CacheGroup(),),
        seed: str = DEFAULT_SEED,
    ) -> None:
        self._format = wire_format
        self._adapters = adapters
        self._groups = groups
        self._root = block_hash(seed)
        self._hashes: dict[BlockKey, bytes] = {}
        self._held: Counter[BlockKey] = Counter()
        """How many blocks hold a key, in all tiers and groups."""

    def payload(self, events: Iterable[CacheEvent], at: float, rank: int) -> bytes:
        """The msgpack of one batch, with the time in seconds since 1970 and the data-parallel rank."""
        written = [fields for event in events for fields in self._translated(event)]
        if self._format is WireFormat.ARRAY:
            written = [list(fields.values()) for fields in written]
        packed: bytes = msgpack.packb([at, written, rank])
        return packed

    def _translated(self, event: CacheEvent) -> list[Any]:
        match event:
            case BlocksStored(tier=Tier.GPU):
                return [self._stored(event)]
            case BlocksStored():
                return [self._copied(event, at) for at in range(len(event.keys))]
            case BlocksRemoved():
                return self._removed(event)
            case CacheCleared():
                self._hashes.clear()
                self._held.clear()
                return [{"type": "AllBlocksCleared"}]

    def _stored(self, event: BlocksStored) -> dict[str, Any]:
        sequence, first = event.sequence, event.first
        end = first + len(event.keys)
        hashes = [self._hash(sequence, index) for index in range(first, end)]
        self._held.update(event.keys)
        scope = sequence.scope
        adapter = self._adapters[scope.adapter] if scope.adapter else None
        extra_keys = [_untagged(self._extra_keys(sequence, index)) for index in range(first, end)]
        fields: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [_published(each) for each in hashes],
            "parent_block_hash": _published(self._hash(sequence, first - 1)) if first else None,
            "token_ids": sequence.of_blocks(first, end),
            "block_size": sequence.block_size,
            "lora_id": adapter.id if adapter else None,
            "medium": MEDIA[event.tier],
            "lora_name": scope.adapter or None,
            "extra_keys": extra_keys if self._format is WireFormat.MAP or any(extra_keys) else None,
        }
        if self._format is WireFormat.MAP:
            group = self._groups[event.group]
            fields |= {"group_idx": event.group, "kv_cache_spec_kind": group.kind}
            if group.sliding_window is not None:
                fields["kv_cache_spec_sliding_window"] = group.sliding_window
        return fields

    def _copied(self, event: BlocksStored, at: int) -> dict[str, Any]:
        """A block that was copied to a slower tier, as the offloading connector describes it: by itself, and without
        the extra keys (`vllm/distributed/kv_transfer/kv_connector/v1/offloading/events.py`)."""
        index = event.first + at
        parent = event.sequence.keys(index)[index - 1] if index else None
        one = BlocksStored((event.keys[at],), parent, event.sequence, index, event.tier, event.group)
        return {**self._stored(one), "extra_keys": None}

    def _removed(self, event: BlocksRemoved) -> list[dict[str, Any]]:
        """One event a block, as vLLM's pool writes them."""
        grouped = {"group_idx": event.group} if self._format is WireFormat.MAP else {}
        written = []
        for key in event.keys:
            name = _published(self._hashes[key])
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key], self._hashes[key]
            written.append({"type": "BlockRemoved", "block_hashes": [name], "medium": MEDIA[event.tier], **grouped})
        return written

    def _hash(self, sequence: SequenceTokens, index: int) -> bytes:
        """The whole hash of a block; those before it are computed where they are not known."""
        keys = sequence.keys(index + 1)
        known = index
        while known >= 0 and keys[known] not in self._hashes:
            known -= 1
        parent = self._hashes[keys[known]] if known >= 0 else self._root
        for at in range(known + 1, index + 1):
            tokens = tuple(sequence.of_blocks(at, at + 1))
            parent = block_hash((parent, tokens, self._extra_keys(sequence, at)))
            self._hashes[keys[at]] = parent
        return parent

    def _extra_keys(self, sequence: SequenceTokens, index: int) -> tuple[tuple[Any, ...], ...] | None:
        """What vLLM hashes into a block beside its tokens, each tagged with its source (vLLM rule 3)."""
        extra: list[tuple[Any, ...]] = []
        scope = sequence.scope
        if scope.adapter:
            extra.append(("lora", scope.adapter, self._adapters[scope.adapter].path))
        if sequence.images:
            extra += [("mm", name, offset) for offset, name in sequence.images_in(index)]
        if scope.salt and not index:
            extra.append(("cache_salt", scope.salt))
        return tuple(extra) or None


def _untagged(extra_keys: tuple[tuple[Any, ...], ...] | None) -> list[Any] | None:
    """As events state them (`to_event_extra_keys` of `vllm/v1/core/kv_cache_utils.py`)."""
    if extra_keys is None:
        return None
    return [key[1:] if key[0] == "mm" else key[1] for key in extra_keys]


def _published(whole: bytes) -> int:
    """The low 64 bits of a hash, which are all that an event carries (vLLM rule 4)."""
    return int.from_bytes(whole[-8:], "big")
