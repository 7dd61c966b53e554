"""Feed messages.

Covers: that what is encoded comes back, and that garbage is refused as a whole, always with a `FeedError`. Not covered:
what consumers make of sequences of messages (tests/router/test_feed.py, tests/router/core).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import msgpack
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.feed import (
    FULL_ATTENTION,
    JSON,
    MSGPACK,
    SLIDING_WINDOW,
    AdaptersChanged,
    Batch,
    CacheGroup,
    Cleared,
    Eviction,
    FeedError,
    Heartbeat,
    HeldElsewhere,
    Load,
    Removed,
    Snapshot,
    Stored,
    Tier,
    WorkerInfo,
    decode_batch,
    decode_eviction,
    decode_heartbeat,
    decode_position,
    decode_snapshot,
    encode_batch,
    encode_eviction,
    encode_heartbeat,
    encode_position,
    encode_snapshot,
)
from kvcache.images import ImageRule
from kvcache.keys import KEY_BYTES

count = st.integers(0, 2**53)
word = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=20)
"""What `str.isprintable` takes."""
key = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
keys = st.lists(key, max_size=5).map(tuple)
load = st.builds(Load, count, count, count, count, count)
words = st.lists(word, max_size=3).map(tuple)
reasons = st.dictionaries(word, st.text(st.characters(exclude_categories=("C",)), max_size=20), max_size=2)
tier = st.sampled_from(Tier)
group_number = st.integers(0, 255)
group = st.builds(CacheGroup, st.sampled_from([FULL_ATTENTION, "mamba"]), count) | st.builds(
    CacheGroup, st.just(SLIDING_WINDOW), count, st.integers(1, 4096)
)
info = st.builds(
    WorkerInfo,
    word,
    count,
    word,
    count,
    word,
    word,
    count,
    engine=st.just("") | word,
    names=words,
    adapters=words,
    missing_adapters=reasons,
    rank=st.integers(0, 3),
    ranks=st.integers(4, 8),
    groups=st.lists(group, max_size=2).map(tuple),
    images=st.none() | st.builds(ImageRule, count, count, st.booleans()),
    tier_seconds=st.dictionaries(tier, st.floats(0, 10), max_size=2),
    complete=st.booleans(),
)
event = st.one_of(
    st.builds(Stored, st.none() | key, keys, tier, group_number),
    st.builds(Removed, keys, tier, group_number),
    st.just(Cleared()),
    st.builds(AdaptersChanged, words, reasons),
)
elsewhere = st.lists(st.builds(HeldElsewhere, tier, group_number, keys), max_size=2).map(tuple)
batch = st.builds(Batch, count, count, st.lists(event, max_size=5).map(tuple), load)
block = st.tuples(key, st.none() | key)
snapshot = st.builds(Snapshot, info, count, load, st.lists(block, max_size=5).map(tuple), elsewhere)
heartbeat = st.builds(Heartbeat, info, word, count, load)
eviction = st.builds(Eviction, word, count, count, keys)

INFO = WorkerInfo("w", 5, "m", 16, "f" * 32, "sha256-prefix-128", 924)
EXAMPLES: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "batch": (encode_batch(Batch(5, 6, (Stored(None, (bytes(16),)), Removed((bytes(16),))), Load())), decode_batch),
    "snapshot": (encode_snapshot(Snapshot(INFO, 6, Load(), ((bytes(16), None),))), decode_snapshot),
    "heartbeat": (encode_heartbeat(Heartbeat(INFO, "http://w", 6, Load())), decode_heartbeat),
    "eviction": (encode_eviction(Eviction("w", 5, 6, (bytes(16),))), decode_eviction),
}
DECODERS = [decode for _, decode in EXAMPLES.values()]


def nested(leaves: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    name = st.text(max_size=8)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3), max_leaves=8
    )


json_leaf = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
json_value, msgpack_value = nested(json_leaf), nested(json_leaf | st.binary(max_size=8))


@settings(max_examples=50)
@given(batch)
def test_a_batch_comes_back(message: Batch) -> None:
    data = encode_batch(message)
    assert b"\n" not in data
    assert decode_batch(data) == message


@settings(max_examples=50)
@given(snapshot, st.sampled_from([JSON, MSGPACK]))
def test_a_snapshot_comes_back(message: Snapshot, media_type: str) -> None:
    assert decode_snapshot(encode_snapshot(message, media_type), media_type) == message


@given(heartbeat)
def test_a_heartbeat_comes_back(message: Heartbeat) -> None:
    assert decode_heartbeat(encode_heartbeat(message)) == message


@given(eviction)
def test_an_eviction_comes_back(message: Eviction) -> None:
    assert decode_eviction(encode_eviction(message)) == message


@given(count, count)
def test_a_position_comes_back(epoch: int, seq: int) -> None:
    assert decode_position(encode_position(epoch, seq)) == (epoch, seq)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "1", "1:", ":1", "-1:2", "1:2:3", "1: 2", "１:2", "a:b", "²:1", "1:+2"),
        pytest.param("9" * 5000 + ":1", id="5000 digits"),
    ],
)
def test_a_malformed_position_is_refused(text: str) -> None:
    with pytest.raises(FeedError, match="epoch:seq"):
        decode_position(text)


@given(st.binary(max_size=40))
def test_noise_is_refused(data: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(FeedError):
            decode(data)
    with pytest.raises(FeedError):
        decode_snapshot(data, MSGPACK)


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=50)
@given(st.data())
def test_one_wrong_part_spoils_the_message(name: str, data: st.DataObject) -> None:
    """Put any value in the place of any other: nothing but a `FeedError` may come of it."""
    encoded, decode = EXAMPLES[name]
    fields = json.loads(encoded)
    at = data.draw(st.sampled_from(_paths(fields)))
    changed = _with(fields, at, data.draw(json_value))
    with contextlib.suppress(FeedError):
        decode(orjson.dumps(changed))


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=50)
@given(data=st.data())
def test_half_a_message_is_refused(name: str, data: st.DataObject) -> None:
    encoded, decode = EXAMPLES[name]
    with pytest.raises(FeedError):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(msgpack_value)
def test_any_msgpack_value_is_refused_where_it_is_no_snapshot(value: object) -> None:
    with pytest.raises(FeedError):
        decode_snapshot(msgpack.packb(value), MSGPACK)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("field", ["seq", "epoch", "worker_id", "load", "keys", "blocks", "events"])
def test_a_value_nested_without_end_is_refused(name: str, field: str) -> None:
    encoded, decode = EXAMPLES[name]
    fields = json.loads(encoded)
    if field in fields:
        deep = b"[" * 1000 + b"]" * 1000
        content = orjson.dumps(fields | {field: "DEEP"}).replace(b'"DEEP"', deep)
        with pytest.raises(FeedError):
            decode(content)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        pytest.param("seq", -1, "seq must be a whole number", id="negative"),
        pytest.param("seq", True, "seq must be a whole number", id="boolean"),
        pytest.param("seq", 1.0, "seq must be a whole number", id="fraction"),
        pytest.param("worker_id", "", "worker_id must be a string that is not empty", id="empty name"),
        pytest.param("load", [], "load must be an object", id="load: a list"),
        pytest.param("blocks", {}, "blocks must be a list", id="blocks: an object"),
        pytest.param("blocks", [["00" * 15, None]], "a block key is 16 bytes", id="a short key"),
        pytest.param("blocks", [["00" * 16]], "a block is a pair", id="a key without its parent"),
        pytest.param("blocks", [["zz" * 16, None]], "a block key is 16 bytes", id="no hexadecimal"),
        pytest.param("missing_adapters", {"a": 1}, "an object whose values are strings", id="a reason that is no text"),
        pytest.param("adapters", ["a", ""], "adapters must be a list of strings", id="an adapter without a name"),
        pytest.param("groups", [{"attention": "sliding", "block_size": 16}], "window must be", id="no window"),
        pytest.param(
            "groups", [{"attention": "full", "block_size": 16}] * 257, "at most 256 groups, not 257", id="many groups"
        ),
        pytest.param("images", {"token": 5, "tokens": "9"}, "tokens must be a whole number", id="no number of tokens"),
        pytest.param("images", {"token": 5, "tokens": 9, "hashes_bytes": 1}, "hashes_bytes", id="no boolean"),
        pytest.param("groups", ["full"], "an entry of groups must be an object", id="a group's name only"),
        pytest.param("complete", 1, "complete must be true or false", id="complete: a number"),
        pytest.param("tier_seconds", {"cpu": -1}, "tier_seconds must hold seconds", id="negative seconds"),
        pytest.param("tier_seconds", [], "tier_seconds must be an object", id="tier_seconds: a list"),
        pytest.param("ranks", 0, r"ranks must be from 1 to 1024, not 0", id="no rank"),
        pytest.param("ranks", 10**9, r"ranks must be from 1 to 1024, not 1000000000", id="more ranks than there are"),
        pytest.param("rank", 1, r"rank must be less than ranks \(1\)", id="a rank beyond the last"),
        pytest.param("elsewhere", [{"tier": "moon", "keys": []}], "tier must be one of gpu, cpu, disk", id="a tier"),
        pytest.param("elsewhere", [{"group": 256, "keys": []}], "group must be less than 256", id="a group beyond all"),
    ],
)
def test_the_error_names_the_field(field: str, value: object, says: str) -> None:
    fields = json.loads(EXAMPLES["snapshot"][0]) | {field: value}
    with pytest.raises(FeedError, match=says):
        decode_snapshot(orjson.dumps(fields))


def test_seconds_of_a_tier_of_a_later_release_are_left_out() -> None:
    fields = json.loads(EXAMPLES["snapshot"][0]) | {"tier_seconds": {"cpu": 0.25, "tape": 9}}
    assert decode_snapshot(orjson.dumps(fields)).info.tier_seconds == {Tier.CPU: 0.25}


def test_what_has_its_default_is_not_sent() -> None:
    sent = json.loads(EXAMPLES["snapshot"][0])
    left_out = {
        "engine",
        "names",
        "adapters",
        "missing_adapters",
        "rank",
        "ranks",
        "groups",
        "images",
        "tier_seconds",
        "elsewhere",
    }
    assert not left_out & sent.keys()
    assert json.loads(EXAMPLES["batch"][0])["events"][1] == {"type": "removed", "keys": ["00" * 16]}


def test_an_unknown_event_is_refused() -> None:
    fields = json.loads(EXAMPLES["batch"][0]) | {"events": [{"type": "moved"}]}
    with pytest.raises(FeedError, match="stored, removed, cleared or adapters"):
        decode_batch(orjson.dumps(fields))


def _paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for name, inner in entries for path in _paths(inner, (*at, name)))]


def _with(value: Any, at: tuple[Any, ...], new: object) -> Any:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = _with(copy[at[0]], at[1:], new)
    return copy
