"""vLLM's KV events of the emulated engine: the bytes of a batch beside captured ones, and when a batch is published.

Not covered: the whole way from a request to a router's view over ZMQ (`tests/real_vllm`), and which blocks an engine
stores and removes (`tests/worker/engine/test_captures.py`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from kvcache.feed import Tier
from kvcache.keys import DEFAULT_SCOPE, CacheScope, block_keys
from tests.worker.agent.captures import SIZE, Captured, messages
from worker.agent.core.events import BlockRemoved, BlockStored, decode
from worker.emulator.adapters import Adapter
from worker.emulator.engine.events import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from worker.emulator.engine.tokens import SequenceTokens
from worker.emulator.kv_events.encoding import CacheGroup, VllmEvents
from worker.emulator.kv_events.publisher import END_SEQ, KVEventsPublisher
from worker.kv_events import EndpointError, KVEventsConfig, WireFormat

NOW = 1_795_405_268.5
LORA = {"sql": Adapter(1, "sql", "/adapters/sql", "m")}


def stored(
    tokens: list[int], scope: CacheScope = DEFAULT_SCOPE, first: int = 0, tier: Tier = Tier.GPU, group: int = 0
) -> BlocksStored:
    """The blocks of `tokens` from index `first` on."""
    sequence = SequenceTokens(tokens, SIZE, scope)
    keys = sequence.keys(len(tokens) // SIZE)
    return BlocksStored(tuple(keys[first:]), keys[first - 1] if first else None, sequence, first, tier, group)


class Rebuilt:
    """The engine's events that a capture tells of, by tokens and salts alone: vLLM's hashes serve as names."""

    def __init__(self) -> None:
        self._prefixes: dict[int, tuple[list[int], CacheScope]] = {}

    def events(self, captured: Captured) -> Iterator[CacheEvent]:
        for event in captured.events:
            match event["type"]:
                case "AllBlocksCleared":
                    yield CacheCleared()
                case "BlockStored":
                    yield self._stored(event)
                case "BlockRemoved":
                    (name,) = event["block_hashes"]
                    yield BlocksRemoved(stored(*self._prefixes[name]).keys[-1:])

    def _stored(self, event: dict[str, Any]) -> BlocksStored:
        (salt,) = event["extra_keys"][0] or [""]
        before, scope = self._prefixes.get(event["parent_block_hash"], ([], CacheScope(salt)))
        tokens = [*before, *event["token_ids"]]
        first = len(before) // SIZE
        for index, name in enumerate(event["block_hashes"], start=first + 1):
            self._prefixes[name] = tokens[: index * SIZE], scope
        return stored(tokens, scope, first)


@pytest.mark.parametrize("name", ["kv_events_b16", "kv_events_small"])
def test_a_batch_has_the_bytes_that_vllm_sends(name: str) -> None:
    """The captured engines ran with PYTHONHASHSEED=0; one of their requests stated a session."""
    rebuilt, translated = Rebuilt(), VllmEvents(WireFormat.MAP, {}, seed="0")
    compared = 0
    for captured in messages(name):
        at, events, rank = msgpack.unpackb(captured.payload)
        if sum(event.pop("session_id", None) is not None for event in events):
            expected = msgpack.packb([at, events, rank])
        else:
            expected = captured.payload
        assert translated.payload(rebuilt.events(captured), at, rank) == expected
        compared += expected is captured.payload
    assert compared >= 5


def one(events: VllmEvents, event: CacheEvent) -> Any:
    _, (written,), _ = msgpack.unpackb(events.payload([event], NOW, 0))
    return written


def test_an_array_has_the_fields_of_vllm_0_19() -> None:
    """Beside `kv_event_array_format_0.19.txt`, which vLLM 0.19's own classes wrote."""
    capture = Path(__file__).parents[1] / "data" / "vllm" / "kv_event_array_format_0.19.txt"
    payload = bytes.fromhex(capture.read_text().splitlines()[1])
    _, (plain, salted, removal, cleared), _ = msgpack.unpackb(payload)
    events = VllmEvents(WireFormat.ARRAY, {})
    first = stored(list(range(SIZE)))
    written = [
        one(events, event) for event in (first, stored(list(range(SIZE)), CacheScope("s1")), BlocksRemoved(first.keys))
    ]
    assert [[type(value) for value in event] for event in written] == [
        [type(value) for value in event] for event in (plain, [*salted[:2], None, *salted[3:]], removal)
    ]
    assert written[1][8] == salted[8] == [["s1"]]
    assert one(events, CacheCleared()) == cleared


@pytest.mark.parametrize("wire_format", list(WireFormat), ids=str)
def test_an_event_says_what_the_engine_knows(wire_format: WireFormat) -> None:
    groups = [CacheGroup(), CacheGroup("sliding_window", 128)]
    events = VllmEvents(wire_format, LORA, groups)
    scope = CacheScope("tenant", "sql")
    change = stored(list(range(3 * SIZE)), scope, 0, group=1)
    (read,) = decode(events.payload([change], NOW, 0))
    assert isinstance(read, BlockStored)
    assert (read.tokens, read.block_size, read.medium) == (list(range(3 * SIZE)), SIZE, "GPU")
    assert (read.lora_id, read.lora_name) == (1, "sql")
    assert read.extra_keys == [["sql", "tenant"], ["sql"], ["sql"]]
    named = wire_format is WireFormat.MAP
    assert (read.group, read.kind) == ((1, "sliding_window") if named else (None, None))
    removals = decode(events.payload([BlocksRemoved(change.keys, group=1)], NOW, 0))
    assert removals == [BlockRemoved((name,), "GPU", 1 if named else None) for name in read.block_hashes]


def test_copies_are_reported_block_by_block_and_without_extra_keys() -> None:
    events = VllmEvents(WireFormat.MAP, {})
    scope = CacheScope("tenant")
    (on_gpu,) = decode(events.payload([stored(list(range(2 * SIZE)), scope)], NOW, 0))
    copies = decode(events.payload([stored(list(range(2 * SIZE)), scope, 0, Tier.CPU)], NOW, 0))
    assert isinstance(on_gpu, BlockStored)
    first, second = on_gpu.block_hashes
    assert [(c.block_hashes, c.parent, c.medium, c.extra_keys) for c in copies if isinstance(c, BlockStored)] == [
        ((first,), None, "CPU", []),
        ((second,), first, "CPU", []),
    ]
    removals = decode(
        events.payload([BlocksRemoved(tuple(block_keys(list(range(SIZE)), SIZE, scope)), Tier.CPU)], NOW, 0)
    )
    assert removals == [BlockRemoved((first,), "CPU", 0)]


def test_hashes_depend_on_what_vllm_keeps_apart() -> None:
    events = VllmEvents(WireFormat.MAP, LORA | {"chat": Adapter(2, "chat", "/adapters/chat", "m")})
    tokens = list(range(2 * SIZE))
    scopes = [CacheScope(), CacheScope("a"), CacheScope("b"), CacheScope("", "sql"), CacheScope("", "chat")]
    hashes = [tuple(one(events, stored(tokens, scope))["block_hashes"]) for scope in scopes]
    assert len({each for pair in hashes for each in pair}) == 2 * len(scopes)


def test_a_block_is_named_alike_until_its_last_copy_is_gone() -> None:
    events = VllmEvents(WireFormat.MAP, {})
    change = stored(list(range(2 * SIZE)))
    first = one(events, change)["block_hashes"]
    assert one(events, change)["block_hashes"] == first
    for _ in range(2):
        _, written, _ = msgpack.unpackb(events.payload([BlocksRemoved(change.keys)], NOW, 0))
        assert [event["block_hashes"] for event in written] == [[name] for name in first]
    tail = stored(list(range(2 * SIZE)), first=1)  # its parent is not cached any more, but hashed all the same
    assert one(events, tail)["parent_block_hash"] == first[0]


@pytest.mark.parametrize(
    ("endpoint", "moved"),
    [
        pytest.param("tcp://*:5557", "tcp://*:5559", id="port"),
        pytest.param("inproc://cache", "inproc://cache_dp2", id="inproc"),
        pytest.param("tcp://*:0", "tcp://*:0", id="any-port"),
    ],
)
def test_a_rank_publishes_on_ports_of_its_own(endpoint: str, moved: str) -> None:
    config = KVEventsConfig(endpoint=endpoint, replay_endpoint=endpoint)
    assert config.of_rank(0) == config
    assert (config.of_rank(2).endpoint, config.of_rank(2).replay_endpoint) == (moved, moved)


@pytest.fixture
async def publisher(unused_endpoints: tuple[str, str]) -> AsyncIterator[KVEventsPublisher]:
    endpoint, replay = unused_endpoints
    config = KVEventsConfig(endpoint=endpoint, replay_endpoint=replay, buffer_steps=3, topic="kv")
    one = KVEventsPublisher(config, VllmEvents(WireFormat.MAP, {}), lambda: NOW)
    yield one
    one.close()


@pytest.fixture
def unused_endpoints(tmp_path: Path) -> tuple[str, str]:
    return f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"


async def replayed(publisher: KVEventsPublisher, start: int) -> list[list[bytes]]:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.connect(publisher.config.replay_endpoint or "")
        await asking.send_multipart([b"", start.to_bytes(8, "big")])
        answers = []
        while (frames := await asking.recv_multipart())[-2] != END_SEQ:
            answers.append(frames)
        return answers


async def test_the_last_batches_are_replayed_from_a_number_on(publisher: KVEventsPublisher) -> None:
    for step in range(1, 6):
        publisher.take([stored([step] * SIZE)], step, step)
    assert [frames[:3] for frames in await replayed(publisher, 0)] == [
        [b"", b"kv", seq.to_bytes(8, "big")] for seq in (2, 3, 4)
    ]
    assert [frames[2][-1] for frames in await replayed(publisher, 4)] == [4]
    assert await replayed(publisher, 5) == []


async def test_a_batch_leaves_when_its_step_has_ended(publisher: KVEventsPublisher) -> None:
    """A step that has ended already, one that is seen begin and end, and a reset while the engine is idle."""
    publisher.take([stored([1] * SIZE)], 1, 1)
    assert publisher.published == 1
    publisher.take([stored([2] * SIZE)], 2, 1)
    publisher.take([], 2, 1)
    assert publisher.published == 1
    publisher.take([stored([3] * SIZE)], 3, 2)
    assert publisher.published == 2
    publisher.take([], 3, 3)
    assert publisher.published == 3
    publisher.take([CacheCleared()], 3, 3)
    publisher.take([], 3, 3)
    publisher.take([stored([2] * SIZE)], 4, 3)
    assert publisher.published == 3
    publisher.take([], 4, 4)
    (*_, payload) = (await replayed(publisher, 3))[0]
    assert [event["type"] for event in msgpack.unpackb(payload)[1]] == ["AllBlocksCleared", "BlockStored"]


async def test_a_request_that_is_none_is_not_answered(publisher: KVEventsPublisher) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.connect(publisher.config.replay_endpoint or "")
        await asking.send_multipart([b"", b"two", b"frames too many"])
        await asking.send_multipart([b"", bytes(8)])
        assert (await asking.recv_multipart())[-2] == END_SEQ


async def test_an_endpoint_that_is_taken_is_refused(
    publisher: KVEventsPublisher, unused_endpoints: tuple[str, str]
) -> None:
    config = KVEventsConfig(endpoint="tcp://*:nothing")
    with pytest.raises(EndpointError, match="kv-events-config: tcp://\\*:nothing"):
        KVEventsPublisher(config, VllmEvents(WireFormat.MAP, {}), lambda: NOW)


def test_settings_are_those_of_vllm(settings_of: Callable[..., Any]) -> None:
    assert settings_of().published_kv_events is None
    assert settings_of("--kv-events", "zmq").published_kv_events.endpoint == "tcp://*:5557"
    flag = json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:1", "topic": "t"})
    config = settings_of("--kv-events-config", flag).published_kv_events
    assert (config.endpoint, config.replay_endpoint, config.topic) == ("tcp://*:1", None, "t")
    assert settings_of("--kv-events-config", json.dumps({"endpoint": "tcp://*:1"})).published_kv_events is None


@pytest.fixture
def settings_of() -> Callable[..., Any]:
    from worker.settings import Settings

    return lambda *flags: Settings.load(list(flags))
