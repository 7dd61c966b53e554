"""From vLLM's block hashes to our keys: the published blocks are those of a naive model of the cache, and never more.

Not covered: order and loss of batches (`test_follower.py`); the memory and time of many blocks
(`bench/micro/agent.py`); blocks outside the GPU (`test_tiers.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.feed import Cleared, Event, Removed, Stored
from kvcache.keys import BlockKey, CacheScope, block_keys
from tests.worker.agent.captures import NAMES, cached, messages
from tests.worker.agent.engine import CLEARED, packed, removed, stored
from worker.agent.core.blocks import DropReason
from worker.agent.core.events import decode
from worker.agent.core.groups import EngineBlocks

SIZE = 2


def applied(*events: dict[str, Any], blocks: EngineBlocks | None = None) -> EngineBlocks:
    blocks = blocks or EngineBlocks(SIZE)
    blocks.apply(decode(packed(*events)))
    return blocks


def held(blocks: EngineBlocks) -> Counter[BlockKey]:
    return Counter(key for key, _ in blocks.blocks())


class Reader:
    """A router: counts, and takes no removal of what it does not hold."""

    def __init__(self) -> None:
        self.keys: Counter[BlockKey] = Counter()

    def read(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Stored(parent, keys):
                    assert parent is None or len(parent) == 16
                    self.keys.update(keys)
                case Removed(keys):
                    for key in keys:
                        assert self.keys[key] > 0
                        self.keys[key] -= 1
                case Cleared():
                    self.keys.clear()
        self.keys = +self.keys


@pytest.mark.parametrize("name", NAMES)
def test_captures_end_in_the_keys_of_their_prompts(name: str) -> None:
    blocks, reader = EngineBlocks(16), Reader()
    captured = messages(name)
    for at, message in enumerate(captured):
        reader.read(blocks.apply(decode(message.payload)))
        if at % 10 == 0 or at == len(captured) - 1:
            assert held(blocks) == reader.keys == cached(captured[: at + 1])
    assert blocks.physical == reader.keys.total() > 0
    assert blocks.unknown_removals == 0
    assert not blocks.dropped


def test_a_snapshot_lists_parents_first_and_each_physical_block() -> None:
    blocks = applied(stored([1, 2], [5, 6, 7, 8]), stored([3], [9, 9], 1), stored([2], [7, 8], 1))
    a, b = block_keys([5, 6, 7, 8], SIZE)
    _, c = block_keys([5, 6, 9, 9], SIZE)
    assert list(blocks.blocks()) == [(a, None), (b, a), (b, a), (c, a)]
    assert blocks.physical == 4


def test_a_hash_stored_twice_is_dropped_after_two_removals() -> None:
    blocks = applied(stored([1], [5, 6]), stored([1], [5, 6]))
    (key,) = block_keys([5, 6], SIZE)
    for left in (1, 0):
        assert blocks.apply(decode(packed(removed(1)))) == [Removed((key,))]
        assert held(blocks)[key] == left
    assert blocks.apply(decode(packed(removed(1)))) == []
    assert blocks.unknown_removals == 1


def test_removals_in_a_row_are_one_event_in_order() -> None:
    blocks = applied(stored([1, 2, 3], [1, 2, 3, 4, 5, 6]))
    a, b, c = block_keys([1, 2, 3, 4, 5, 6], SIZE)
    events = blocks.apply(decode(packed(removed(3), removed(2), stored([2], [3, 4], 1), removed(1))))
    assert events == [Removed((c, b)), Stored(a, (b,)), Removed((a,))]


def test_a_removed_parent_leaves_its_children_their_keys() -> None:
    blocks = applied(stored([1, 2], [1, 2, 3, 4]), removed(1), stored([3], [5, 6], 2))
    _, b, c = block_keys([1, 2, 3, 4, 5, 6], SIZE)
    assert held(blocks) == Counter([b, c])


@pytest.mark.parametrize(
    ("fields", "scope"),
    [
        pytest.param({"extra_keys": [["tenant"], None]}, CacheScope("tenant"), id="salt"),
        pytest.param({"extra_keys": [None, None]}, CacheScope(), id="no extra keys"),
        pytest.param({"extra_keys": None}, CacheScope(), id="no list of extra keys"),
        pytest.param(
            {"lora_name": "sql", "lora_id": 1, "extra_keys": [["sql"], ["sql"]]},
            CacheScope(adapter="sql"),
            id="adapter by name",
        ),
        pytest.param(
            {"lora_name": "sql", "lora_id": 1, "extra_keys": [["sql", "tenant"], ["sql"]]},
            CacheScope("tenant", "sql"),
            id="adapter and salt",
        ),
        pytest.param(
            {"lora_name": "sql", "lora_id": 7, "extra_keys": [[7], [7]]},
            CacheScope(adapter="sql"),
            id="adapter by number",
        ),
        pytest.param(
            {"lora_name": "sql", "lora_id": 1}, CacheScope(adapter="sql"), id="adapter not among the extra keys"
        ),
        pytest.param({"group_idx": 0, "kv_cache_spec_kind": "mla_attention"}, CacheScope(), id="attention kind"),
        pytest.param({"medium": None}, CacheScope(), id="no medium"),
    ],
)
def test_what_a_key_separates(fields: dict[str, Any], scope: CacheScope) -> None:
    blocks = applied(stored([1, 2], [5, 6, 7, 8], **fields), stored([3], [9, 9], 2))
    assert held(blocks) == Counter(block_keys([5, 6, 7, 8, 9, 9], SIZE, scope))


@pytest.mark.parametrize(
    ("event", "reason", "published"),
    [
        pytest.param(stored([1], [5, 6], 99), "unknown_parent", 0, id="unknown parent"),
        pytest.param(stored([1], [5, 6], medium="TAPE"), "medium", 0, id="unknown medium"),
        pytest.param(stored([1], [5, 6], medium="CPU"), "unidentified", 0, id="never on the GPU"),
        pytest.param(stored([1, 2], [5, 6, 7, 8], medium="CPU"), "chunk", 0, id="a chunk of two blocks"),
        pytest.param(stored([1], [5, 6], medium="CPU", locality="REMOTE"), "locality", 0, id="another host's CPU"),
        pytest.param(stored([1], [5, 6], locality="REMOTE"), "locality", 0, id="another host's GPU"),
        pytest.param(stored([1], [5, 6], medium="STORAGE"), "locality", 0, id="a disk that may be anywhere"),
        pytest.param(
            {**stored([1], [5, 6], medium="CPU"), "token_ids": [], "block_size": 0},
            "unreadable",
            0,
            id="not self-describing",
        ),
        pytest.param(stored([1], [5, 6], group_idx=64), "kind", 0, id="a group beyond all"),
        pytest.param(stored([1], [5, 6], kv_cache_spec_kind="mamba"), "kind", 0, id="Mamba"),
        pytest.param(stored([1], [5, 6], kv_cache_spec_kind="sliding_window"), "kind", 0, id="a window of no size"),
        pytest.param(stored([1], [5, 6, 7]), "block_size", 0, id="other block size"),
        pytest.param(stored([1], [5, 6], lora_id=3), "adapter", 0, id="adapter by number alone"),
        pytest.param(stored([1], [5, 6], lora_id=3, lora_name=""), "adapter", 0, id="adapter without a name"),
        pytest.param(stored([1], [5, 6], extra_keys=[["image", "tenant"]]), "extra_keys", 0, id="two names"),
        pytest.param(stored([1], [5, 6], extra_keys=[[["image", 2]]]), "extra_keys", 0, id="an image beyond the block"),
        pytest.param(stored([1], [5, 6], extra_keys=[[["image", -1]]]), "extra_keys", 0, id="an image before all"),
        pytest.param(stored([1], [5, 6], extra_keys=[[["b", 1], ["a", 0]]]), "extra_keys", 0, id="images in disorder"),
        pytest.param(stored([1], [5, 6], extra_keys=[[["image", "0"]]]), "extra_keys", 0, id="an image nowhere"),
        pytest.param(stored([1], [5, 6], extra_keys=[[b"embedding"]]), "extra_keys", 0, id="embedding"),
        pytest.param(
            stored([1, 2, 3], [5, 6, 7, 8, 9, 9], extra_keys=[None, [b"embedding"], None]),
            "extra_keys",
            1,
            id="embedding in the second block",
        ),
        pytest.param(
            stored([1, 2], [5, 6, 7, 8], extra_keys=[None, "odd"]), "extra_keys", 1, id="salt in the second block"
        ),
        pytest.param({**stored([1, 2], [5, 6]), "block_size": 2}, "unreadable", 0, id="too few tokens"),
        pytest.param(stored([1], [5, -6]), "unreadable", 0, id="negative token"),
        pytest.param(stored([1], [5, "6"]), "unreadable", 0, id="token as text"),
        pytest.param(stored([1], [5, 2**32]), "unreadable", 0, id="token beyond 32 bits"),
    ],
)
def test_what_has_no_key_is_counted_and_kept_out(event: dict[str, Any], reason: str, published: int) -> None:
    blocks = applied(event)
    assert blocks.physical == published
    assert blocks.dropped == {DropReason(reason): len(event["block_hashes"]) - published}
    child = applied(stored([50], [1, 2], event["block_hashes"][-1]), blocks=blocks)
    assert child.physical == published
    gone = {name: event[name] for name in ("medium", "group_idx") if name in event}
    applied(*(removed(name, **gone) for name in event["block_hashes"]), blocks=blocks)
    assert blocks.physical == 0


def test_images_are_part_of_the_key_from_where_they_begin() -> None:
    extra = [["tenant"], [["cat", 1]], [["cat", -1], ["dog", 1]], [["dog", -1]], None]
    blocks = applied(stored([1, 2, 3, 4, 5], [5, 6, 7, 9, 9, 9, 9, 8, 8, 8], extra_keys=extra))
    images = [(3, "cat"), (5, "dog")]
    assert held(blocks) == Counter(block_keys([5, 6, 7, 9, 9, 9, 9, 8, 8, 8], SIZE, CacheScope("tenant"), images))
    other = applied(stored([6], [9, 9], 2, extra_keys=[[["cat", -1], ["cow", 1]]]), blocks=blocks)
    keys = block_keys([5, 6, 7, 9, 9, 9], SIZE, CacheScope("tenant"), [(3, "cat"), (5, "cow")])
    assert keys[-1] in held(other)
    assert not blocks.dropped


def test_a_copy_on_the_cpu_does_not_count() -> None:
    blocks = applied(stored([1], [5, 6]), stored([1], [5, 6], medium="CPU"), removed(1, medium="CPU"))
    assert blocks.physical == 1
    assert applied(removed(1), blocks=blocks).physical == 0


def test_events_are_counted_by_type() -> None:
    blocks = applied(stored([1], [5, 6]), removed(1), CLEARED, {"type": "New"}, {**stored([1], [1, 2]), "token_ids": 3})
    assert blocks.events == {"stored": 1, "removed": 1, "cleared": 1, "unknown": 1, "unreadable": 1}


# --- any sequence of events -----------------------------------------------------------------------------

SCOPES = (CacheScope(), CacheScope("tenant"), CacheScope(adapter="sql"))
Prefix = tuple[CacheScope, tuple[int, ...]]


def name_of(prefix: Prefix) -> int:
    return hash(prefix) & (2**64 - 1)


class Engine:
    """Stores runs of blocks below what it holds, removes any block: wilder than vLLM, which removes tails first."""

    def __init__(self) -> None:
        self.held: Counter[Prefix] = Counter()

    def keys(self) -> Counter[BlockKey]:
        keys: Counter[BlockKey] = Counter()
        for (scope, tokens), count in self.held.items():
            keys[block_keys(tokens, SIZE, scope)[-1]] += count
        return keys

    def store(self, above: Prefix, tokens: list[int]) -> dict[str, Any]:
        scope, prefix = above
        names, extra = [], [scope.adapter] if scope.adapter else []
        for at in range(0, len(tokens), SIZE):
            prefix += tuple(tokens[at : at + SIZE])
            names.append(name_of((scope, prefix)))
            self.held[scope, prefix] += 1
        keys = [extra or None for _ in names]
        if not above[1] and scope.salt:
            keys[0] = [*extra, scope.salt]
        parent = name_of(above) if above[1] else None
        adapter = {"lora_id": 1, "lora_name": scope.adapter} if scope.adapter else {}
        return stored(names, tokens, parent, extra_keys=keys, **adapter)

    def remove(self, prefix: Prefix) -> dict[str, Any]:
        self.held[prefix] -= 1
        self.held = +self.held
        return removed(name_of(prefix))


RUNS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(lambda bits: [bit for bit in bits for _ in range(SIZE)])


def draw_event(data: st.DataObject, engine: Engine) -> dict[str, Any]:
    prefixes = sorted(engine.held, key=repr)
    kind = data.draw(st.sampled_from(["store"] * 4 + ["remove"] * 3 + ["clear", "noise"]))
    if kind == "remove" and prefixes:
        return engine.remove(data.draw(st.sampled_from(prefixes)))
    if kind == "clear":
        engine.held.clear()
        return CLEARED
    if kind == "noise":
        return data.draw(st.sampled_from(NOISE))
    roots: list[Prefix] = [(scope, ()) for scope in SCOPES]
    return engine.store(data.draw(st.sampled_from(roots + prefixes)), data.draw(RUNS))


NOISE = [
    stored([1, 2], [0, 0, 1, 1], medium="CPU"),
    removed(name_of((SCOPES[0], (0, 0))), medium="CPU"),
    stored([name_of((SCOPES[0], (0, 0)))], [0, 0], group_idx=64),
    removed(name_of((SCOPES[0], (0, 0))), group_idx=64),
    stored([3], [1, 1, 1], None),
    stored([4], [1, 1], 77),
    removed(78),
    {"type": "Unheard"},
]


@given(st.data())
def test_any_sequence_gives_the_multiset_of_a_plain_model(data: st.DataObject) -> None:
    engine, blocks, reader = Engine(), EngineBlocks(SIZE), Reader()
    for _ in range(data.draw(st.integers(1, 25))):
        reader.read(blocks.apply(decode(packed(draw_event(data, engine)))))
        assert held(blocks) == reader.keys == engine.keys()
        assert blocks.physical == reader.keys.total()


@given(st.data())
def test_history_that_begins_anywhere_gives_a_part_of_it(data: st.DataObject) -> None:
    engine = Engine()
    for _ in range(data.draw(st.integers(1, 10))):
        draw_event(data, engine)
    blocks, reader = EngineBlocks(SIZE), Reader()
    for _ in range(data.draw(st.integers(1, 15))):
        reader.read(blocks.apply(decode(packed(draw_event(data, engine)))))
        assert held(blocks) == reader.keys
        assert reader.keys <= engine.keys()


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.binary(max_size=3),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=12,
    ).map(lambda value: msgpack.packb([0, [["BlockStored", [1], None, [1, 1], SIZE, None, "GPU", None, value], value]]))
)
def test_any_payload_is_decoded_or_refused(payload: bytes) -> None:
    blocks = EngineBlocks(SIZE)
    try:
        blocks.apply(decode(payload))
    except ValueError:
        assert blocks.physical == 0
