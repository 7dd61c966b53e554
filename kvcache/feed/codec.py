"""The cache feed's messages as bytes.

Keys are hexadecimal in JSON and raw bytes in msgpack. Fields that have a default are left out where they have it, and
older releases do not send them. Decoders raise `FeedError` on anything malformed, and never return half a message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import msgpack
import orjson

from kvcache.feed.messages import (
    MAX_GROUPS,
    SLIDING_WINDOW,
    AdaptersChanged,
    Batch,
    CacheGroup,
    Cleared,
    Event,
    Eviction,
    Heartbeat,
    HeldElsewhere,
    Load,
    Removed,
    Snapshot,
    Stored,
    Tier,
    WorkerInfo,
)
from kvcache.images import ImageRule
from kvcache.keys import KEY_BYTES, BlockKey
from kvcache.ranks import MAX_RANKS

MSGPACK = "application/msgpack"
JSON = "application/json"

_POSITION_PART = re.compile("[0-9]{1,20}")


class FeedError(ValueError):
    """A feed message is malformed; the message says which field and why."""


def encode_position(epoch: int, seq: int) -> str:
    """`epoch:seq`: the id of a server-sent event and (quoted) the ETag of a snapshot."""
    return f"{epoch}:{seq}"


def decode_position(text: str) -> tuple[int, int]:
    """Inverse of `encode_position`. Raises `FeedError`."""
    epoch, colon, seq = text.partition(":")
    if not (colon and _POSITION_PART.fullmatch(epoch) and _POSITION_PART.fullmatch(seq)):
        raise FeedError(f"a feed position looks like 'epoch:seq', not {text[:80]!r}")
    return int(epoch), int(seq)


def _to_json(message: object) -> bytes:
    """Dataclasses become objects, and keys hexadecimal."""
    return orjson.dumps(message, default=bytes.hex)


def _stated(info: WorkerInfo) -> dict[str, Any]:
    stated = {name: value for name, value in asdict(info).items() if name not in _LEFT_OUT or value != _LEFT_OUT[name]}
    if info.tier_seconds:
        stated["tier_seconds"] = {tier.value: seconds for tier, seconds in info.tier_seconds.items()}
    return stated


def _event_fields(event: Event) -> dict[str, Any]:
    match event:
        case Stored(parent, keys, tier, group):
            return {"type": "stored", "parent": parent, "keys": keys, **_place(tier, group)}
        case Removed(keys, tier, group):
            return {"type": "removed", "keys": keys, **_place(tier, group)}
        case Cleared():
            return {"type": "cleared"}
        case AdaptersChanged(names, missing):
            return {"type": "adapters", "names": names, **({"missing": missing} if missing else {})}


def _place(tier: Tier, group: int) -> dict[str, Any]:
    place: dict[str, Any] = {} if tier is Tier.GPU else {"tier": tier}
    return {**place, "group": group} if group else place


def encode_batch(batch: Batch) -> bytes:
    """JSON of one batch: the data line of a server-sent event (it holds no newline)."""
    events = [_event_fields(event) for event in batch.events]
    return _to_json({"epoch": batch.epoch, "seq": batch.seq, "events": events, "load": batch.load})


def encode_snapshot(snapshot: Snapshot, media_type: str = JSON) -> bytes:
    """A snapshot as JSON, or as msgpack when `media_type` is `MSGPACK`."""
    whole = {**_stated(snapshot.info), "seq": snapshot.seq, "load": asdict(snapshot.load), "blocks": snapshot.blocks}
    if snapshot.elsewhere:
        whole["elsewhere"] = [{**_place(held.tier, held.group), "keys": held.keys} for held in snapshot.elsewhere]
    if media_type != MSGPACK:
        return _to_json(whole)
    packed: bytes = msgpack.packb(whole)
    return packed


def encode_heartbeat(heartbeat: Heartbeat) -> bytes:
    """JSON body of `POST /internal/heartbeat`."""
    pushed = {"url": heartbeat.url, "seq": heartbeat.seq, "load": heartbeat.load}
    return _to_json({**_stated(heartbeat.info), **pushed})


def encode_eviction(eviction: Eviction) -> bytes:
    """JSON body of `POST /internal/eviction`."""
    return _to_json(eviction)


# --- decoding -------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A value for an error message. Of a container only the type is shown, for it may be nested too deeply."""
    return type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.80}"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise FeedError(f"{where} must be an object, not {type(value).__name__}")
    return value


def _integer(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int or value < 0:
        raise FeedError(f"{name} must be a whole number of 0 or more, not {_shown(value)}")
    return value


def _string(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if type(value) is not str or not value:
        raise FeedError(f"{name} must be a string that is not empty, not {_shown(value)}")
    return value


def _sequence(message: dict[str, Any], name: str) -> Sequence[Any]:
    value = message.get(name)
    if type(value) is not list:
        raise FeedError(f"{name} must be a list, not {type(value).__name__}")
    return value


def _key(value: Any) -> BlockKey:
    try:
        key = value if type(value) is bytes else bytes.fromhex(value)
    except (TypeError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise FeedError(f"a block key is {KEY_BYTES} bytes ({2 * KEY_BYTES} hexadecimal digits), not {_shown(value)}")
    return key


def _keys(message: dict[str, Any]) -> tuple[BlockKey, ...]:
    return tuple(_key(value) for value in _sequence(message, "keys"))


def _names(message: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _sequence(message, name)
    if not all(type(value) is str and value for value in values):
        raise FeedError(f"{name} must be a list of strings that are not empty")
    return tuple(values)


def _texts(message: dict[str, Any], name: str) -> dict[str, str]:
    values = _mapping(message.get(name), name)
    if not all(type(key) is str and key and type(value) is str for key, value in values.items()):
        raise FeedError(f"{name} must be an object whose values are strings")
    return values


def _groups(message: dict[str, Any], name: str) -> tuple[CacheGroup, ...]:
    groups = _sequence(message, name)
    if len(groups) > MAX_GROUPS:
        raise FeedError(f"{name} must hold at most {MAX_GROUPS} groups, not {len(groups)}")
    return tuple(_group(_mapping(value, f"an entry of {name}")) for value in groups)


def _group(message: dict[str, Any]) -> CacheGroup:
    group = CacheGroup(
        _string(message, "attention"),
        _integer(message, "block_size"),
        _integer(message, "window") if "window" in message else 0,
    )
    if (group.attention == SLIDING_WINDOW) != (group.window > 0):
        raise FeedError(
            f"window must be more than 0 for a sliding window and 0 for other attention, not {group.window}"
        )
    return group


def _tier_seconds(message: dict[str, Any], name: str) -> dict[Tier, float]:
    """Tiers that are not known here are left out: their blocks cannot be used."""
    seconds = {}
    for tier, value in _mapping(message.get(name), name).items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise FeedError(f"{name} must hold seconds of 0 or more, not {_shown(value)}")
        if tier in _TIERS:
            seconds[_TIERS[tier]] = float(value)
    return seconds


def _flag(message: dict[str, Any], name: str) -> bool:
    value = message.get(name)
    if type(value) is not bool:
        raise FeedError(f"{name} must be true or false, not {_shown(value)}")
    return value


def _image_rule(message: dict[str, Any], name: str) -> ImageRule | None:
    if message.get(name) is None:
        return None
    rule = _mapping(message[name], name)
    hashes = rule.get("hashes_bytes", False)
    if type(hashes) is not bool:
        raise FeedError(f"hashes_bytes must be true or false, not {_shown(hashes)}")
    return ImageRule(_integer(rule, "token"), _integer(rule, "tokens"), hashes)


_TIERS = {tier.value: tier for tier in Tier}
_READERS: dict[object, Callable[[dict[str, Any], str], Any]] = {
    "int": _integer,
    "str": _string,
    "tuple[str, ...]": _names,
    "tuple[CacheGroup, ...]": _groups,
    "Mapping[str, str]": _texts,
    "ImageRule | None": _image_rule,
    "Mapping[Tier, float]": _tier_seconds,
    "bool": _flag,
}
_LEFT_OUT: dict[str, Any] = {
    "engine": "",
    "names": (),
    "adapters": (),
    "missing_adapters": {},
    "rank": 0,
    "ranks": 1,
    "groups": (),
    "images": None,
    "tier_seconds": {},
    "complete": True,
}
"""Fields of `WorkerInfo` that are not sent while they have these values."""
_ADDED_LATER: dict[str, Any] = {"prefilled": 0, "prefilled_tokens": 0, "max_model_len": 0, **_LEFT_OUT}
"""Fields that a message may lack, and the values that they then have."""
_FIELDS = {kind: [(field.name, _READERS[field.type]) for field in fields(kind)] for kind in (Load, WorkerInfo)}


def _values(kind: type[Load | WorkerInfo], given: dict[str, Any]) -> list[Any]:
    return [
        _ADDED_LATER[name] if name in _ADDED_LATER and name not in given else read(given, name)
        for name, read in _FIELDS[kind]
    ]


def _load(message: dict[str, Any]) -> Load:
    return Load(*_values(Load, _mapping(message.get("load"), "load")))


def _info(message: dict[str, Any]) -> WorkerInfo:
    info = WorkerInfo(*_values(WorkerInfo, message))
    if not 1 <= info.ranks <= MAX_RANKS:
        raise FeedError(f"ranks must be from 1 to {MAX_RANKS}, not {info.ranks}")
    if info.rank >= info.ranks:
        raise FeedError(f"rank must be less than ranks ({info.ranks}), not {info.rank}")
    return info


def _tier_and_group(message: dict[str, Any]) -> tuple[Tier, int]:
    tier = message.get("tier", Tier.GPU.value)
    if type(tier) is not str or tier not in _TIERS:
        raise FeedError(f"tier must be one of {', '.join(_TIERS)}, not {_shown(tier)}")
    group = _integer(message, "group") if "group" in message else 0
    if group >= MAX_GROUPS:
        raise FeedError(f"group must be less than {MAX_GROUPS}, not {group}")
    return _TIERS[tier], group


def _event(value: Any) -> Event:
    message = _mapping(value, "an event")
    kind = message.get("type")
    if kind == "stored":
        parent = message.get("parent")
        return Stored(None if parent is None else _key(parent), _keys(message), *_tier_and_group(message))
    if kind == "removed":
        return Removed(_keys(message), *_tier_and_group(message))
    if kind == "cleared":
        return Cleared()
    if kind == "adapters":
        return AdaptersChanged(_names(message, "names"), _texts(message, "missing") if "missing" in message else {})
    raise FeedError(f"an event's type is stored, removed, cleared or adapters, not {_shown(kind)}")


def _held_elsewhere(value: Any) -> HeldElsewhere:
    message = _mapping(value, "an entry of elsewhere")
    return HeldElsewhere(*_tier_and_group(message), _keys(message))


def _pair(value: Any) -> tuple[BlockKey, BlockKey | None]:
    if type(value) is not list or len(value) != 2:
        raise FeedError(f"a block is a pair [key, parent key or null], not {_shown(value)}")
    return _key(value[0]), None if value[1] is None else _key(value[1])


def _json(data: bytes | str) -> dict[str, Any]:
    try:
        return _mapping(orjson.loads(data), "the message")
    except orjson.JSONDecodeError as error:
        raise FeedError(f"the message is not JSON: {error}") from None


def decode_batch(data: bytes | str) -> Batch:
    """Inverse of `encode_batch`. Raises `FeedError`."""
    message = _json(data)
    return Batch(
        epoch=_integer(message, "epoch"),
        seq=_integer(message, "seq"),
        events=tuple(_event(value) for value in _sequence(message, "events")),
        load=_load(message),
    )


def decode_snapshot(data: bytes, media_type: str = JSON) -> Snapshot:
    """Inverse of `encode_snapshot`. Raises `FeedError`."""
    if media_type == MSGPACK:
        try:
            message = _mapping(msgpack.unpackb(data), "the message")
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise FeedError(f"the message is not msgpack: {error}") from None
    else:
        message = _json(data)
    return Snapshot(
        info=_info(message),
        seq=_integer(message, "seq"),
        load=_load(message),
        blocks=tuple(_pair(value) for value in _sequence(message, "blocks")),
        elsewhere=tuple(_held_elsewhere(value) for value in _sequence(message, "elsewhere"))
        if "elsewhere" in message
        else (),
    )


def decode_heartbeat(data: bytes) -> Heartbeat:
    """Inverse of `encode_heartbeat`. Raises `FeedError`."""
    message = _json(data)
    return Heartbeat(
        info=_info(message),
        url=_string(message, "url"),
        seq=_integer(message, "seq"),
        load=_load(message),
    )


def decode_eviction(data: bytes) -> Eviction:
    """Inverse of `encode_eviction`. Raises `FeedError`."""
    message = _json(data)
    return Eviction(
        worker_id=_string(message, "worker_id"),
        epoch=_integer(message, "epoch"),
        seq=_integer(message, "seq"),
        keys=_keys(message),
    )
