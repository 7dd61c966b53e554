"""KV-cache groups with a sliding window: what is stored, given back, evicted and hit.

The figures follow from vLLM 0.32's `SlidingWindowManager`. Not covered: what routers predict of it
(tests/router/test_engine_shapes.py), and the group of full attention alone (test_block_pool.py, test_scheduling.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import HeldElsewhere, Removed, Stored
from tests.worker.engine.conftest import Script, drain, make_engine
from worker.emulator.engine.config import EngineConfig, EngineConfigError
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest

SIZE = 16
MakeRequest = Callable[..., EngineRequest]


def hybrid(**changes: int) -> Engine:
    """Blocks of 16 tokens; a window of 33 tokens, for which a hit needs 2 blocks."""
    return make_engine(**({"blocks": 40, "sliding_window": 33, "sliding_groups": 1, "max_model_len": 256} | changes))


def cached(engine: Engine) -> tuple[int, int]:
    """Blocks that the full group and the sliding group hold."""
    return len(engine.blocks()), sum(len(held.keys) for held in engine.elsewhere())


def run(engine: Engine, request: EngineRequest) -> int:
    """Cached tokens of a request that runs alone."""
    now = engine.next_event() or 0.0
    engine.submit(request, now)
    return drain(engine)[0].cached_tokens


def test_each_group_stores_the_blocks_of_a_prompt(request_of: MakeRequest) -> None:
    engine = hybrid(sliding_groups=2, max_model_len=192)
    run(engine, request_of(100))
    events = feed_events(engine.take_events())
    assert [(event.group, len(event.keys)) for event in events if isinstance(event, Stored)] == [(0, 6), (1, 6), (2, 6)]
    assert len({event.keys for event in events if isinstance(event, Stored)}) == 1, "the keys are the same"
    assert engine.load().free_blocks == 40


def test_blocks_that_leave_the_window_are_given_back_while_the_request_runs(request_of: MakeRequest) -> None:
    engine = hybrid()
    engine.submit(request_of(100, max_tokens=100), 0.0)
    engine.advance(0.0)
    assert 40 - engine.load().free_blocks == 7 + 7, "the first step computes the prompt with blocks for all of it"
    for _ in range(2):
        engine.advance(engine.next_event() or 0.0)
    # 101 tokens are computed; the next one looks at 101 - 32 = 69 and later: 4 blocks lie before.
    assert 40 - engine.load().free_blocks == 7 + 3
    assert cached(engine) == (6, 6), "they can still be hit"


def test_a_prefix_is_hit_only_where_its_window_is_in_place(request_of: MakeRequest) -> None:
    engine = hybrid(blocks=24, max_num_batched_tokens=32, max_num_seqs=1, max_model_len=192)
    prompt = list(range(161))
    run(engine, request_of(prompt))
    assert cached(engine) == (10, 10)
    run(engine, request_of(60))  # evicts the four sliding blocks that were given back first
    assert cached(engine) == (13, 9)
    assert run(engine, request_of(prompt)) == 160, "the window before the end is in place"
    short = request_of([*prompt[:64], 7])
    assert run(engine, short) == 0, "the full group holds 4 blocks of it, the other none"


def test_a_short_prefix_needs_all_of_its_blocks(request_of: MakeRequest) -> None:
    engine = hybrid(sliding_window=1000)
    prompt = list(range(60))
    run(engine, request_of(prompt))
    assert run(engine, request_of([*prompt[:40], 7])) == 32


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=25),
    st.integers(1, 100),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_the_events_give_the_cache_and_nothing_leaks(
    requests: list[tuple[int, int, int]], window: int, groups: int, together: bool
) -> None:
    """Under preemption and eviction, with requests one after the other or all at once."""
    longest = 176
    config = {"blocks": 60, "max_num_batched_tokens": 64, "max_model_len": longest, "max_num_seqs": 4}
    engine = make_engine(**config, sliding_window=window, sliding_groups=groups)
    held: dict[int, Counter[bytes]] = {group: Counter() for group in range(groups + 1)}

    def follow(engine: Engine) -> None:
        for event in feed_events(engine.take_events()):
            match event:
                case Stored(_, keys, _, group):
                    held[group].update(keys)
                case Removed(keys, _, group):
                    assert Counter(keys) <= held[group]
                    held[group].subtract(keys)

    for number, (family, length, output) in enumerate(requests):
        prompt = [family * 1000 + at for at in range(length)]
        engine.submit(EngineRequest(str(number), prompt, output, Script()), engine.next_event() or 0.0)
        if not together:
            drain(engine, follow)
    drain(engine, follow)
    follow(engine)
    assert engine.load().free_blocks == 60
    assert +held[0] == Counter(key for key, _ in engine.blocks())
    elsewhere = {place.group: Counter(place.keys) for place in engine.elsewhere()}
    assert {group: +held[group] for group in range(1, groups + 1) if +held[group]} == elsewhere
    assert all(isinstance(place, HeldElsewhere) for place in engine.elsewhere())
    assert len(engine.take_finished()) == len(requests)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"sliding_window": 8}, "both or neither", id="a window without groups"),
        pytest.param({"sliding_groups": 1}, "both or neither", id="groups without a window"),
        pytest.param({"sliding_window": 8, "sliding_groups": 1, "cpu_blocks": 4}, "not emulated", id="a CPU tier"),
        pytest.param({"sliding_window": 8, "sliding_groups": 256}, "at most 255", id="too many groups"),
        pytest.param({"sliding_window": 200, "sliding_groups": 9}, "in 10 groups", id="no room for a request"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, int], says: str) -> None:
    with pytest.raises(EngineConfigError, match=says):
        EngineConfig(40, 64, 8, 256, **changes)  # type: ignore[arg-type]
