"""The CPU tier: which blocks are copied to it, when they are loaded back, and what that costs, as vLLM's offloading
connector does it.

Not covered: the tier's events replayed against its contents, and that every request ends (`test_engine_properties.py`);
its metrics (`tests/worker/test_metrics.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcache.feed import Event, HeldElsewhere, Removed, Stored, Tier
from kvcache.keys import block_keys
from tests.worker.engine.conftest import LATENCY, drain, make_engine, serve
from worker.emulator.engine.config import EngineConfigError
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events

LOAD = 0.001
"""Seconds that loading one block takes."""


def engine_with(cpu_blocks: int, **settings: int) -> Engine:
    return make_engine(cpu_blocks=cpu_blocks, cpu_block_seconds=LOAD, **settings)


def cpu_events(engine: Engine) -> list[Event]:
    return [e for e in feed_events(engine.take_events()) if isinstance(e, Stored | Removed) and e.tier is Tier.CPU]


def test_a_prompts_blocks_are_copied_when_they_are_computed_and_an_answers_are_not(request_of: Callable) -> None:
    engine = engine_with(100, max_num_batched_tokens=32)
    prompt = list(range(50))
    keys = tuple(block_keys(prompt, 16))
    engine.submit(request_of(prompt, max_tokens=40), 0.0)
    engine.advance(0.0)
    assert engine.elsewhere() == (), "the step that computes them is under way"
    engine.advance(LATENCY.prefill(2))
    assert cpu_events(engine) == [Stored(None, keys[:2], Tier.CPU)]
    drain(engine)
    assert cpu_events(engine) == [Stored(keys[1], keys[2:], Tier.CPU)]
    assert len(engine.blocks()) == 5
    assert engine.elsewhere() == (HeldElsewhere(Tier.CPU, 0, (*reversed(keys),)),), "the head is the most recent"


def test_blocks_that_the_gpu_lost_are_loaded_and_count_as_cached(request_of: Callable) -> None:
    engine = engine_with(100, blocks=20)
    prompt = list(range(100))
    keys = block_keys(prompt, 16)
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(20 * 16 - 1)], 1.0)
    assert keys[0] not in dict(engine.blocks())
    engine.take_events()
    (output,) = serve(engine, [request_of(prompt)], 2.0)
    assert output.cached_tokens == 96
    assert output.at == pytest.approx(2.0 + 6 * LOAD + LATENCY.prefill(0))
    stored = [event for event in feed_events(engine.take_events()) if isinstance(event, Stored)]
    assert stored == [Stored(None, tuple(keys))], "they are on the GPU again, and were on the CPU all the time"
    stats = engine.stats
    assert (stats.prefix_cache_hits, stats.external_cache_hits) == (0, 96)
    assert stats.external_cache_queries == 100 + (20 * 16 - 1) + 100
    assert (stats.loaded_blocks, stats.load_seconds) == (6, pytest.approx(6 * LOAD))


def test_only_what_the_gpu_does_not_hold_is_loaded_and_the_rest_is_computed(request_of: Callable) -> None:
    engine = engine_with(100, blocks=20)
    prompt = list(range(160))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(15 * 16)], 1.0)  # takes 10 free blocks, and the last 6 of the prompt's
    assert len(set(block_keys(prompt, 16)) & set(dict(engine.blocks()))) == 5
    (output,) = serve(engine, [request_of([*prompt, *range(1000, 1040)])], 2.0)
    assert output.cached_tokens == 160
    assert output.at == pytest.approx(2.0 + 5 * LOAD + LATENCY.prefill(3))
    assert engine.stats.loaded_blocks == 5


def test_a_load_may_reach_the_last_token_which_is_computed_again(request_of: Callable) -> None:
    """A hit on the GPU never does (rule 8); vLLM's scheduler takes one token off a full load."""
    engine = engine_with(100, blocks=20)
    prompt = list(range(64))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(20 * 16 - 1)], 1.0)
    engine.take_events()
    (output,) = serve(engine, [request_of(prompt)], 2.0)
    assert output.cached_tokens == 64
    assert [e for e in feed_events(engine.take_events()) if isinstance(e, Stored)] == [
        Stored(None, tuple(block_keys(prompt, 16)))
    ]
    assert engine.load().free_blocks == 20


def test_a_load_delays_its_own_request_only(request_of: Callable) -> None:
    engine = engine_with(100, blocks=40)
    prompt = list(range(160))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(40 * 16 - 1)], 1.0)
    loading, other = request_of(prompt), request_of(16)
    outputs = serve(engine, [loading, other], 2.0)
    at = {output.request_id: output.at for output in outputs}
    assert at[other.request_id] == pytest.approx(2.0 + LATENCY.prefill(1))
    assert at[loading.request_id] == pytest.approx(2.0 + 10 * LOAD + LATENCY.prefill(0))


def test_loads_run_one_after_the_other(request_of: Callable) -> None:
    engine = engine_with(100, blocks=40)
    prompts = [list(range(start, start + 160)) for start in (0, 1000)]
    serve(engine, [request_of(prompt) for prompt in prompts])
    serve(engine, [request_of(40 * 16 - 1)], 1.0)
    outputs = serve(engine, [request_of(prompt) for prompt in prompts], 2.0)
    assert [output.at for output in outputs] == pytest.approx(
        [2.0 + 10 * LOAD + LATENCY.prefill(0), 2.0 + 20 * LOAD + LATENCY.prefill(0)]
    )


def test_a_request_waits_for_blocks_that_another_one_loads_and_hits_them(request_of: Callable) -> None:
    engine = engine_with(100, blocks=40)
    prompt = list(range(160))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(40 * 16 - 1)], 1.0)
    first, second = serve(engine, [request_of([*prompt, 5]), request_of([*prompt, 6])], 2.0)
    assert first.cached_tokens == second.cached_tokens == 160
    assert engine.stats.loaded_blocks == 10, "once"
    assert engine.stats.prefix_cache_hits == 160, "the second one found them on the GPU"


def test_a_request_that_does_not_read_the_cache_loads_nothing(request_of: Callable) -> None:
    engine = engine_with(100, blocks=20)
    prompt = list(range(100))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(20 * 16 - 1)], 1.0)
    (output,) = serve(engine, [request_of(prompt, read_cache=False)], 2.0)
    assert output.cached_tokens == engine.stats.loaded_blocks == 0


def test_the_least_recently_used_blocks_go_first_and_the_tail_before_the_head(request_of: Callable) -> None:
    engine = engine_with(6)
    old, new = list(range(64)), list(range(1000, 1048))
    serve(engine, [request_of(old)])
    engine.take_events()
    serve(engine, [request_of(new)], 1.0)
    keys = block_keys(old, 16)
    assert cpu_events(engine) == [
        Removed((keys[3],), Tier.CPU),
        Stored(None, tuple(block_keys(new, 16)), Tier.CPU),
    ]


def test_blocks_that_do_not_fit_are_not_stored_at_all(request_of: Callable) -> None:
    engine = engine_with(3)
    serve(engine, [request_of(64)])
    assert engine.elsewhere() == ()
    serve(engine, [request_of(48)], 1.0)
    assert sum(len(held.keys) for held in engine.elsewhere()) == 3


def test_a_block_may_leave_the_tier_before_its_children(request_of: Callable) -> None:
    """A request that hits the head on the GPU and loads the tail makes only the tail recent."""
    engine = engine_with(10, blocks=20)
    prompt = list(range(160))
    keys = block_keys(prompt, 16)
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(15 * 16)], 1.0)  # does not fit into the tier; leaves 5 blocks of the prompt on the GPU
    serve(engine, [request_of([*prompt, 7])], 2.0)
    assert engine.stats.loaded_blocks == 5
    engine.take_events()
    serve(engine, [request_of(3 * 16)], 3.0)
    assert cpu_events(engine)[0] == Removed((keys[4], keys[3], keys[2]), Tier.CPU)


def test_an_aborted_load_gives_its_blocks_back_when_it_ends(request_of: Callable) -> None:
    engine = engine_with(100, blocks=20)
    prompt = list(range(160))
    serve(engine, [request_of(prompt)])
    serve(engine, [request_of(20 * 16 - 1)], 1.0)
    request = request_of(prompt)
    engine.submit(request, 2.0)
    engine.advance(2.0)
    assert (engine.load().waiting, engine.load().free_blocks) == (1, 10)
    assert engine.abort(request.request_id, 2.001)
    assert (engine.load().waiting, engine.load().free_blocks) == (0, 10), "the transfer still writes to them"
    assert drain(engine) == []
    assert engine.load().free_blocks == 20
    assert engine.next_event() is None


def test_a_reset_empties_both_tiers(request_of: Callable) -> None:
    engine = engine_with(100)
    serve(engine, [request_of(100)])
    assert engine.reset_prefix_cache()
    assert engine.blocks() == []
    assert engine.elsewhere() == ()


@pytest.mark.parametrize(
    "settings", [{"cpu_blocks": -1}, {"cpu_blocks": 8, "enable_prefix_caching": False}], ids=["negative", "no_caching"]
)
def test_a_tier_that_cannot_work_is_refused(settings: dict) -> None:
    with pytest.raises(EngineConfigError):
        make_engine(**settings)
