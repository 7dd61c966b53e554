"""The cache feed: how a worker tells routers which blocks it holds and how loaded it is.

Pull (the usual way): `GET /cache/state` answers a `Snapshot`, `GET /cache/events` streams `Batch`es. Push (for
workers outside a cluster): the same values in the bodies of `/internal/heartbeat`, `/internal/sync` and
`/internal/eviction`.

The *epoch* names one incarnation of a worker: microseconds since 1970 at process start, so that a later incarnation has
a greater one. Within an epoch every batch that changes the cache has the next *seq*; a snapshot at seq S contains every
batch up to S. A consumer that sees a gap or another epoch takes a new snapshot.

One event is one *physical* block. An engine may hold two blocks of the same key (vLLM rule 9), so the same key
can be stored k times and removed k times: consumers count.

Keys are hexadecimal in JSON and raw bytes in msgpack. Decoders raise `FeedError` on anything malformed, and
never return half a message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack
import orjson

from kvcache.keys import KEY_BYTES, BlockKey

MSGPACK = "application/msgpack"
JSON = "application/json"

_POSITION_PART = re.compile("[0-9]{1,20}")


class FeedError(ValueError):
    """A feed message is malformed; the message says which field and why."""


@dataclass(frozen=True, slots=True)
class Load:
    """The work of an engine at one moment.

    `prefill_tokens` are prompt tokens still to be computed, waiting requests included; `free_blocks` are
    blocks no running request refers to (cached or not), of `total_blocks` usable ones. `prefilled` and
    `prefilled_tokens` only grow: requests that reached their first token, and prompt tokens computed for these; 0 if
    the worker does not say.
    """

    running: int = 0
    waiting: int = 0
    prefill_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prefilled: int = 0
    prefilled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is, and what must agree before a router may match prompts against its cache."""

    worker_id: str
    epoch: int
    model: str
    block_size: int
    fingerprint: str
    """Of the tokenizer: see `kvcache.tokens.tokenizer.Tokenizer.fingerprint`."""
    key_scheme: str
    capacity: int
    """Usable blocks."""
    max_model_len: int = 0
    """Most tokens of one request, prompt and answer together; 0: not known."""
    engine: str = ""
    """URL of the engine, by its agent's settings, where another process takes the requests; empty: this one does."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that entered the cache: a run of one sequence, each block the child of the one before."""

    parent: BlockKey | None
    """Key of the block before the first; None when the run starts a prompt."""
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that were evicted, in the order of their eviction."""

    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The whole cache was reset."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Batch:
    """What changed at one moment. With events, `seq` is one more than the last batch's; without events (a load report
    only) it is that of the last batch."""

    epoch: int
    seq: int
    events: tuple[Event, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole cache at `seq`. A key held by k physical blocks is listed k times."""

    info: WorkerInfo
    seq: int
    load: Load
    blocks: tuple[tuple[BlockKey, BlockKey | None], ...]
    """(key, parent key) of every cached block, a parent before its children."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Pushed at an interval: it registers the worker at `url`. `seq` is that of the worker's last batch."""

    info: WorkerInfo
    url: str
    seq: int
    load: Load


@dataclass(frozen=True, slots=True)
class Eviction:
    """Pushed removals between two syncs."""

    worker_id: str
    epoch: int
    seq: int
    keys: tuple[BlockKey, ...]


# --- encoding -------------------------------------------------------------------------------------------


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
    return {name: value for name, value in asdict(info).items() if name != "engine" or value}


def _event_fields(event: Event) -> dict[str, Any]:
    match event:
        case Stored(parent, keys):
            return {"type": "stored", "parent": parent, "keys": keys}
        case Removed(keys):
            return {"type": "removed", "keys": keys}
        case Cleared():
            return {"type": "cleared"}


def encode_batch(batch: Batch) -> bytes:
    """JSON of one batch: the data line of a server-sent event (it holds no newline)."""
    events = [_event_fields(event) for event in batch.events]
    return _to_json({"epoch": batch.epoch, "seq": batch.seq, "events": events, "load": batch.load})


def encode_snapshot(snapshot: Snapshot, media_type: str = JSON) -> bytes:
    """A snapshot as JSON, or as msgpack when `media_type` is `MSGPACK`."""
    whole = {**_stated(snapshot.info), "seq": snapshot.seq, "load": asdict(snapshot.load), "blocks": snapshot.blocks}
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


_READERS: dict[object, Callable[[dict[str, Any], str], Any]] = {"int": _integer, "str": _string}
_ADDED_LATER = {"prefilled": 0, "prefilled_tokens": 0, "max_model_len": 0, "engine": ""}
"""Fields that older releases do not send, and the values that they then have."""
_FIELDS = {
    kind: [(field.name, _READERS[field.type], _ADDED_LATER.get(field.name)) for field in fields(kind)]
    for kind in (Load, WorkerInfo)
}


def _values(kind: type[Load | WorkerInfo], given: dict[str, Any]) -> list[Any]:
    return [read(given, name) if default is None or name in given else default for name, read, default in _FIELDS[kind]]


def _load(message: dict[str, Any]) -> Load:
    return Load(*_values(Load, _mapping(message.get("load"), "load")))


def _info(message: dict[str, Any]) -> WorkerInfo:
    return WorkerInfo(*_values(WorkerInfo, message))


def _event(value: Any) -> Event:
    message = _mapping(value, "an event")
    kind = message.get("type")
    if kind == "stored":
        parent = message.get("parent")
        return Stored(None if parent is None else _key(parent), _keys(message))
    if kind == "removed":
        return Removed(_keys(message))
    if kind == "cleared":
        return Cleared()
    raise FeedError(f"an event's type is stored, removed or cleared, not {_shown(kind)}")


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
