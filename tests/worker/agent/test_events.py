"""Decoding of vLLM's events: captures of both forms, and what later or faulty engines may send.

Not covered: fields that vLLM has and the agent ignores.
"""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from tests.worker.agent.captures import DATA, NAMES, messages
from worker.agent.core.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventError,
    UnknownEvent,
    Unreadable,
    decode,
)


def batch(*events: Any) -> bytes:
    return msgpack.packb([1.5, list(events)])


@pytest.mark.parametrize("name", NAMES)
def test_captures_of_maps(name: str) -> None:
    for message in messages(name):
        for decoded, expected in zip(decode(message.payload), message.events, strict=True):
            assert type(decoded).__name__ == expected["type"]
            if isinstance(decoded, BlockStored):
                assert decoded.tokens == expected["token_ids"]
                assert (decoded.block_size, decoded.medium) == (16, "GPU")
                assert (decoded.group, decoded.kind) == (0, "full_attention")
                assert decoded.extra_keys == expected["extra_keys"]
            if isinstance(decoded, BlockStored | BlockRemoved):
                names = [f"hex:{name.hex()}" if isinstance(name, bytes) else name for name in decoded.block_hashes]
                assert names == expected["block_hashes"]


def test_a_capture_of_arrays() -> None:
    payload = bytes.fromhex((DATA / "kv_event_array_format_0.19.txt").read_text().splitlines()[1])
    first, second, third, fourth = decode(payload)
    assert first == BlockStored((11, 12), None, [0, 1, 2, 3], 2, None, None, [], "GPU", None, None)
    assert second == BlockStored((13,), 12, [4, 5], 2, None, None, [["s1"]], "GPU", None, None)
    assert third == BlockRemoved((11,), "GPU", None)
    assert fourth == AllBlocksCleared()


def test_the_oldest_arrays_end_early() -> None:
    assert decode(batch(["BlockStored", [1], None, [5, 6], 2], ["BlockRemoved", [1]])) == [
        BlockStored((1,), None, [5, 6], 2, None, None, [], None, None, None),
        BlockRemoved((1,), None, None),
    ]


def test_the_batch_itself_may_be_a_map() -> None:
    assert decode(msgpack.packb({"ts": 1.5, "events": [{"type": "AllBlocksCleared"}]})) == [AllBlocksCleared()]


def test_what_later_versions_add_is_ignored() -> None:
    stored = ["BlockStored", [1], None, [5, 6], 2, None, "GPU", None, None, 0, "full_attention", None, "more"]
    events = decode(
        batch(stored, {"type": "BlockMoved", "to": "moon"}, ["BlockMoved", 1], {"type": "AllBlocksCleared", "x": 1})
    )
    assert isinstance(events[0], BlockStored)
    assert events[1:] == [UnknownEvent("BlockMoved"), UnknownEvent("BlockMoved"), AllBlocksCleared()]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"token_ids": None}, id="no tokens"),
        pytest.param({"block_size": 0}, id="block size 0"),
        pytest.param({"block_size": "2"}, id="block size as text"),
        pytest.param({"parent_block_hash": "x"}, id="parent as text"),
        pytest.param({"block_hashes": [1.5, True]}, id="hashes of other types"),
        pytest.param({"block_hashes": None}, id="no hashes"),
        pytest.param({"lora_id": "1"}, id="adapter's number as text"),
        pytest.param({"lora_name": b"sql"}, id="adapter as bytes"),
        pytest.param({"extra_keys": "tenant"}, id="salt without a list"),
        pytest.param({"medium": 1}, id="medium as a number"),
        pytest.param({"group_idx": "1"}, id="group as text"),
        pytest.param({"kv_cache_spec_kind": 1}, id="kind of attention as a number"),
        pytest.param({"kv_cache_spec_sliding_window": 1.5}, id="part of a token"),
        pytest.param({"locality": False}, id="locality as a truth value"),
    ],
)
def test_stored_blocks_that_cannot_be_read_are_only_missing(fields: dict[str, Any]) -> None:
    stored = {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": [1],
        "block_size": 2,
    }
    (event,) = decode(batch({**stored, **fields}))
    assert isinstance(event, Unreadable)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x93\x01", id="cut short"),
        pytest.param(msgpack.packb({"ts": 1.5}), id="map without events"),
        pytest.param(msgpack.packb([1.5]), id="no events"),
        pytest.param(msgpack.packb([1.5, "events"]), id="events as text"),
        pytest.param(batch("BlockStored"), id="event as text"),
        pytest.param(batch([]), id="event without a type"),
        pytest.param(batch({"hashes": [1]}), id="map without a type"),
        pytest.param(batch([["BlockStored"], 1]), id="type that is a list"),
        pytest.param(b"\x81\x90\x01", id="map with a list as a key"),
        pytest.param(batch({"type": "BlockRemoved"}), id="removal without hashes"),
        pytest.param(batch({"type": "BlockRemoved", "block_hashes": [1], "medium": 1}), id="removal from a number"),
        pytest.param(batch(["BlockRemoved", [1], "GPU", "1"]), id="removal from a group as text"),
        pytest.param(batch(["BlockRemoved", [None]]), id="removal of None"),
        pytest.param(batch({"type": "BlockStored", "lora_name": b"\xff"}) + b"\x00", id="trailing bytes"),
    ],
)
def test_a_batch_whose_removals_are_unknown_is_an_error(payload: bytes) -> None:
    with pytest.raises(EventError):
        decode(payload)
