"""The cache feed: a subscriber knows exactly what the engine holds, from whichever position it follows.

Not covered: the router's side (`tests/router/test_feed.py`), and the wire format (`tests/kvcache/test_feed.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.feed import (
    MSGPACK,
    Batch,
    Cleared,
    Event,
    Load,
    Removed,
    Stored,
    decode_batch,
    decode_position,
    decode_snapshot,
)
from worker.feed.log import HISTORY_BATCHES, SUBSCRIBER_BYTES, FeedLog

EPOCH = 1_795_000_000_000_000


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def messages(raw: bytes) -> list[tuple[str, str, Batch]]:
    """(id, event, batch) of each server-sent event."""
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["id"], fields["event"], decode_batch(fields["data"])))
    return found


def apply(blocks: Counter[bytes], events: tuple[Event, ...]) -> None:
    for event in events:
        match event:
            case Stored(_, keys):
                blocks.update(keys)
            case Removed(keys):
                blocks.subtract(keys)
            case Cleared():
                blocks.clear()


# --- the log -----------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.data())
def test_a_subscriber_gets_exactly_what_came_after_its_position(count, data) -> None:
    feed = FeedLog(EPOCH, Load())
    for number in range(count):
        feed.publish([Stored(None, (key(number),))], Load(running=number))
    seen = data.draw(st.integers(0, count))
    subscriber = feed.subscribe((EPOCH, seen), lambda: None)
    assert subscriber is not None
    later = data.draw(st.integers(0, 5))
    for number in range(count, count + later):
        feed.publish([Stored(None, (key(number),))], Load(running=number))
    batches = [batch for _, name, batch in messages(subscriber.take()) if name == "batch"]
    assert [batch.seq for batch in batches] == list(range(seen + 1, count + later + 1))
    assert [batch.events[0].keys[0] for batch in batches] == [key(n) for n in range(seen, count + later)]


def test_positions_of_another_epoch_of_the_future_or_no_longer_kept_cannot_be_resumed() -> None:
    feed = FeedLog(EPOCH, Load())
    for number in range(HISTORY_BATCHES + 10):
        feed.publish([Removed((key(number),))], Load())
    assert feed.subscribe((EPOCH - 1, feed.seq), lambda: None) is None
    assert feed.subscribe((EPOCH, feed.seq + 1), lambda: None) is None
    assert feed.subscribe((EPOCH, 5), lambda: None) is None
    assert feed.subscribe((EPOCH, feed.seq), lambda: None) is not None


def test_the_history_is_bounded_in_bytes_too() -> None:
    feed = FeedLog(EPOCH, Load())
    large = tuple(key(number) for number in range(3000))
    for _ in range(100):
        feed.publish([Stored(None, large)], Load())
    assert feed.subscribe((EPOCH, feed.seq - 90), lambda: None) is None


def test_a_subscriber_that_does_not_read_is_dropped_and_never_holds_more_than_its_bound() -> None:
    feed = FeedLog(EPOCH, Load())
    subscriber = feed.subscribe(None, lambda: None)
    assert subscriber is not None
    large = tuple(key(number) for number in range(3000))
    for _ in range(SUBSCRIBER_BYTES // (3000 * 35) + 2):
        feed.publish([Stored(None, large)], Load())
    assert subscriber.overrun
    assert len(subscriber.take()) <= SUBSCRIBER_BYTES


def test_of_load_reports_that_wait_only_the_newest_is_kept() -> None:
    feed = FeedLog(EPOCH, Load())
    subscriber = feed.subscribe(None, lambda: None)
    assert subscriber is not None
    for running in range(5):
        feed.publish_load(Load(running=running))
    assert [(name, batch.load.running) for _, name, batch in messages(subscriber.take())] == [("load", 4)]
    feed.publish_load(Load(running=7))
    feed.publish([Cleared()], Load(running=8))
    assert [(name, batch.load.running) for _, name, batch in messages(subscriber.take())] == [("batch", 8)]


# --- the endpoints -----------------------------------------------------------------------------------------


async def test_the_state_describes_the_worker_and_its_cache(start, tokenizer) -> None:
    harness = start(speed=1000, worker_id="w-1", block_size=16, blocks=200)
    await harness.client.post("/v1/completions", {"prompt": [5] * 50, "max_tokens": 1})
    reply = await harness.client.get("/cache/state")
    snapshot = decode_snapshot(reply.body)
    assert snapshot.info.worker_id == "w-1"
    assert snapshot.info.epoch == harness.worker.epoch
    assert (snapshot.info.block_size, snapshot.info.capacity) == (16, 200)
    assert snapshot.info.fingerprint == tokenizer.fingerprint
    assert snapshot.blocks == tuple(harness.rank.engine.blocks())
    assert len(snapshot.blocks) == 3
    assert reply.header("content-type") == "application/json"
    packed = await harness.client.get("/cache/state", {"accept": MSGPACK})
    assert packed.header("content-type") == MSGPACK
    assert decode_snapshot(packed.body, MSGPACK) == snapshot


async def test_an_unchanged_state_is_not_sent_again(start) -> None:
    harness = start(speed=1000)
    first = await harness.client.get("/cache/state")
    etag = first.header("etag")
    assert etag == f'"{harness.worker.epoch}:0"'
    for known in (etag, f"W/{etag}", f'"x", {etag}'):
        again = await harness.client.get("/cache/state", {"if-none-match": known})
        assert (again.status, again.body, again.header("etag")) == (304, b"", etag)
    await harness.client.post("/v1/completions", {"prompt": [5] * 50, "max_tokens": 1})
    assert (await harness.client.get("/cache/state", {"if-none-match": etag})).status == 200


@pytest.mark.looptime
async def test_events_replayed_on_a_snapshot_give_the_engines_cache(start) -> None:
    harness = start(blocks=40, max_model_len=None)
    client, engine = harness.client, harness.rank.engine
    await client.post("/v1/completions", {"prompt": [1] * 200, "max_tokens": 20, "ignore_eos": True})
    snapshot = decode_snapshot((await client.get("/cache/state")).body)
    position = f"{snapshot.info.epoch}:{snapshot.seq}"
    follower, reply = client.begin("GET", "/cache/events", headers={"last-event-id": position})
    await asyncio.gather(
        *[
            client.post("/v1/completions", {"prompt": [n] * 150, "max_tokens": 30, "n": 2, "ignore_eos": True})
            for n in range(2, 9)
        ]
    )
    await asyncio.sleep(0.1)
    blocks = Counter(key for key, _ in snapshot.blocks)
    seen = snapshot.seq
    for name_id, name, batch in messages(reply.body):
        assert decode_position(name_id) == (batch.epoch, batch.seq)
        if name == "batch":
            assert batch.seq == seen + 1
            seen = batch.seq
            apply(blocks, batch.events)
        else:
            assert (name, batch.seq, batch.events) == ("load", seen, ())
    assert +blocks == Counter(key for key, _ in engine.blocks())
    assert any(isinstance(event, Removed) for *_, batch in messages(reply.body) for event in batch.events)
    assert batch.load == engine.load()
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    assert harness.rank.feed.subscribers == 0


@pytest.mark.looptime
async def test_a_position_that_cannot_be_resumed_gets_a_reset_and_the_end(start) -> None:
    harness = start()
    for position in (f"{harness.worker.epoch - 5}:0", f"{harness.worker.epoch}:9"):
        reply = await harness.client.get("/cache/events", {"last-event-id": position})
        assert reply.header("content-type") == "text/event-stream; charset=utf-8"
        ((where, name, _),) = messages(reply.body)
        assert (where, name) == (f"{harness.worker.epoch}:0", "reset")
    bad = await harness.client.get("/cache/events", {"last-event-id": "yesterday"})
    assert bad.status == 400


@pytest.mark.looptime
async def test_a_feed_without_changes_is_kept_alive_every_second(start) -> None:
    harness = start()
    follower, reply = harness.client.begin("GET", "/cache/events")
    await asyncio.sleep(5.5)
    times = [at for at, part in reply.writes if part]
    assert [name for _, name, _ in messages(reply.body)] == ["load"] * 6
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx([1.0] * 5, abs=0.01)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    await asyncio.sleep(1.1)
    assert not harness.rank.publisher.armed  # nobody subscribes


@pytest.mark.looptime
async def test_load_reports_come_at_most_every_twenty_milliseconds_and_end_with_the_truth(start) -> None:
    harness = start(speed=20)
    follower, reply = harness.client.begin("GET", "/cache/events")
    await asyncio.sleep(0.5)
    bodies = [{"prompt": [n] * 100, "max_tokens": 100, "ignore_eos": True} for n in range(5)]
    await asyncio.gather(*[harness.client.post("/v1/completions", body) for body in bodies])
    await asyncio.sleep(0.5)
    loads = [(at, batch) for at, part in reply.writes for _, name, batch in messages(part) if name == "load"]
    for (earlier, _), (later, _) in pairwise(loads):
        assert later - earlier >= 0.0195
    assert messages(reply.body)[-1][2].load == harness.rank.engine.load()
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)


@pytest.mark.looptime
async def test_a_slow_subscriber_is_dropped_with_a_reset(start) -> None:
    harness = start()
    gate = asyncio.Event()
    follower, reply = harness.client.begin("GET", "/cache/events", gate=gate)
    gate.set()
    await asyncio.sleep(0.01)
    gate.clear()
    many: list[Any] = [Stored(None, tuple(key(number) for number in range(3000)))]
    await asyncio.sleep(1.1)  # a sign of life is being written, and does not get through
    for _ in range(12):
        harness.rank.feed.publish(many, Load())
    await asyncio.sleep(0.1)
    gate.set()
    await follower
    assert messages(reply.body)[-1][1] == "reset"
    assert harness.rank.feed.subscribers == 0
    assert harness.rank.feed.resets == 1


@pytest.mark.looptime
async def test_the_feed_ends_when_the_worker_closes(start) -> None:
    harness = start()
    follower, _ = harness.client.begin("GET", "/cache/events")
    await asyncio.sleep(0.1)
    await harness.worker.finish_requests(1.0)
    await follower
    assert (await harness.client.get("/cache/events")).status == 503
