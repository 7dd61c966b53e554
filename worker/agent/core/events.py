"""vLLM's KV events as they come over ZMQ: msgpack of `[timestamp, [events], rank?]`.

An event is a map with `type` (vLLM 0.24 and later) or an array that begins with the type (0.11 to 0.22). In both forms
unknown fields are ignored, and trailing fields may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack

T = TypeVar("T")

BlockHash = int | bytes
"""vLLM's hash of a block. It is opaque: only the low 64 bits of what vLLM chains, so no other hash follows from it."""

_ARRAY_FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
        "group_idx", "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip


class EventError(ValueError):
    """A batch cannot be read, so what it removed is not known. The message says why."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A run of blocks of one sequence: `tokens` are those of all of them, in order."""

    block_hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    tokens: list[Any]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    extra_keys: list[Any]
    """What vLLM hashed beside the tokens, one entry a block; shorter when the event did not say."""
    medium: str | None
    group: int | None
    kind: str | None
    """Of attention, as vLLM names it; None before about 0.24."""
    locality: str | None = None
    """LOCAL or REMOTE, as seen from the engine."""
    window: int | None = None
    """Tokens of a sliding window."""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    block_hashes: tuple[BlockHash, ...]
    medium: str | None
    group: int | None
    locality: str | None = None


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    pass


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Blocks were stored, but this module cannot read which: `blocks` is their number."""

    blocks: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event of an unknown type, as later versions may have."""

    type: str


EngineEvent = BlockStored | BlockRemoved | AllBlocksCleared | Unreadable | UnknownEvent


def decode(payload: bytes) -> list[EngineEvent]:
    """The events of one batch. Raises `EventError`."""
    try:
        batch = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:  # TypeError: a list as a map's key
        raise EventError(f"the batch is not msgpack: {error}") from None
    if type(batch) is dict:  # as newer sources than the captured 0.32 declare it
        events = batch.get("events")
    else:
        events = batch[1] if type(batch) is list and len(batch) > 1 else None
    if type(events) is not list:
        raise EventError("a batch is an array of a timestamp and a list of events")
    return [_event(value) for value in events]


def _event(value: Any) -> EngineEvent:
    if type(value) is dict:
        kind, fields = value.get("type"), value
    elif type(value) is list and value:
        kind = value[0]
        known = _ARRAY_FIELDS.get(kind, ()) if type(kind) is str else ()
        fields = dict(zip(known, value[1:], strict=False))
    else:
        raise EventError(f"an event is a map or an array that begins with its type, not {type(value).__name__}")
    if type(kind) is not str:
        raise EventError("an event has no type")
    match kind:
        case "BlockStored":
            return _stored(fields)
        case "BlockRemoved":
            return _removed(fields)
        case "AllBlocksCleared":
            return AllBlocksCleared()
    return UnknownEvent(kind)


def _stored(fields: Mapping[str, Any]) -> BlockStored | Unreadable:
    block_hashes = _block_hashes(fields)
    if block_hashes is None:
        return Unreadable(1)
    tokens, parent, size = fields.get("token_ids"), fields.get("parent_block_hash"), fields.get("block_size")
    if type(tokens) is not list or type(size) is not int or size < 1 or not (parent is None or _is_block_hash(parent)):
        return Unreadable(len(block_hashes))
    try:
        return BlockStored(
            block_hashes=block_hashes,
            parent=parent,
            tokens=tokens,
            block_size=size,
            lora_id=_optional(fields, "lora_id", int),
            lora_name=_optional(fields, "lora_name", str),
            extra_keys=_optional(fields, "extra_keys", list) or [],
            medium=_optional(fields, "medium", str),
            group=_optional(fields, "group_idx", int),
            kind=_optional(fields, "kv_cache_spec_kind", str),
            locality=_optional(fields, "locality", str),
            window=_optional(fields, "kv_cache_spec_sliding_window", int),
        )
    except EventError:
        return Unreadable(len(block_hashes))


def _removed(fields: Mapping[str, Any]) -> BlockRemoved:
    block_hashes = _block_hashes(fields)
    if block_hashes is None:
        raise EventError("a removal does not name its blocks")
    return BlockRemoved(
        block_hashes,
        _optional(fields, "medium", str),
        _optional(fields, "group_idx", int),
        _optional(fields, "locality", str),
    )


def _block_hashes(fields: Mapping[str, Any]) -> tuple[BlockHash, ...] | None:
    block_hashes = fields.get("block_hashes")
    return tuple(block_hashes) if type(block_hashes) is list and all(map(_is_block_hash, block_hashes)) else None


def _is_block_hash(value: Any) -> bool:
    return type(value) is int or type(value) is bytes


def _optional(fields: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """None: the event does not say. Raises `EventError` for another type, which may mean anything: to take it for
    silence would make blocks of an adapter, a salt or a slower tier look like everybody's on the GPU."""
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        raise EventError(f"{name} of an event is {type(value).__name__}, not {kind.__name__}")
    return value
