"""Which sequence runs in which step: vLLM's rules 6-8 and 12-17, through the engine's public methods.

Not covered: how long a step takes (`test_time.py`); priorities, LoRA and speculative decoding, which are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcache.feed import Cleared, Removed, Stored
from kvcache.keys import CacheScope, TokenIdError, block_keys
from tests.worker.engine.conftest import drain, make_engine, serve
from worker.emulator.engine.config import EngineConfig, EngineConfigError
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import RequestRefusedError


def step_sizes(engine: Engine) -> list[int]:
    """Tokens of each step until the engine is idle, in order."""
    sizes: list[int] = []
    before = engine.stats.step_tokens.copy()

    def note(engine: Engine) -> None:
        nonlocal before
        sizes.extend((engine.stats.step_tokens - before).elements())
        before = engine.stats.step_tokens.copy()

    engine.advance(engine.next_event())
    note(engine)
    drain(engine, note)
    return sizes


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget(request_of: Callable) -> None:
    chunked = make_engine(max_num_batched_tokens=64)
    chunked.submit(request_of(300), 0.0)
    assert step_sizes(chunked) == [64, 64, 64, 64, 44]


def test_decoding_sequences_go_before_chunks_and_chunks_before_new_ones(request_of: Callable) -> None:
    mixed = make_engine(max_num_batched_tokens=64)
    for length in (30, 100, 20):
        mixed.submit(request_of(length, max_tokens=4), 0.0)
    # 30 + 34 | 1 + 63 | 1 + 3 (the rest of the second) + 20 | 1 + 1 + 1 | ...
    assert step_sizes(mixed) == [64, 64, 24, 3, 2, 2]


@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (32, 16), (33, 32), (79, 64), (80, 64), (81, 80)])
def test_the_last_token_is_always_recomputed(request_of: Callable, length: int, cached: int) -> None:
    warm = make_engine()
    prompt = list(range(length))
    serve(warm, [request_of(prompt)])
    (output,) = serve(warm, [request_of(prompt)], now=1.0)
    assert output.cached_tokens == cached
    assert warm.stats.prefix_cache_queries == 2 * length
    assert warm.stats.prefix_cache_hits == cached


@pytest.mark.parametrize(("total", "blocks"), [(31, 1), (32, 1), (33, 2), (48, 2), (49, 3)])
def test_generated_tokens_fill_blocks_that_can_be_hit(request_of: Callable, total: int, blocks: int) -> None:
    """Rule 7: the last sampled token has no KV yet."""
    cache = make_engine()
    prompt, output = list(range(20)), list(range(100, 100 + total - 20))
    serve(cache, [request_of(prompt, max_tokens=len(output), output=output)])
    expected = block_keys([*prompt, *output], 16)[:blocks]
    assert [key for key, _ in cache.blocks()] == expected
    (again,) = serve(cache, [request_of([*prompt, *output, 5])], now=10.0)
    assert again.cached_tokens == 16 * blocks


def test_a_prompt_can_be_hit_while_it_is_prefilling(request_of: Callable) -> None:
    cache = make_engine()
    prompt = list(range(100))
    cache.submit(request_of(prompt), 0.0)
    cache.advance(0.0)  # the step is under way
    assert len(cache.blocks()) == 6
    cache.submit(request_of(prompt), 0.001)
    assert [output.cached_tokens for output in drain(cache)] == [0, 96]
    assert len(cache.blocks()) == 6


def test_a_recomputed_block_is_a_second_block_of_the_same_key(request_of: Callable) -> None:
    cache = make_engine()
    prompt = list(range(32))
    for now in (0.0, 1.0, 2.0):
        serve(cache, [request_of(prompt)], now)
    first, last = block_keys(prompt, 16)
    assert cache.blocks() == [(first, None), (last, first), (last, first), (last, first)]
    assert feed_events(cache.take_events()) == [
        Stored(None, (first, last)),
        Stored(first, (last,)),
        Stored(first, (last,)),
    ]


def test_scopes_share_nothing(request_of: Callable) -> None:
    cache = make_engine()
    prompt = list(range(64))
    for now, scope in enumerate((CacheScope(), CacheScope(salt="a"), CacheScope(adapter="a"))):
        (output,) = serve(cache, [request_of(prompt, scope=scope)], float(now))
        assert output.cached_tokens == 0
    (output,) = serve(cache, [request_of(prompt, scope=CacheScope(salt="a"))], 9.0)
    assert output.cached_tokens == 48


def test_no_more_sequences_run_than_allowed(request_of: Callable) -> None:
    small = make_engine(max_num_seqs=2)
    for _ in range(5):
        small.submit(request_of(10, max_tokens=3), 0.0)
    loads = []
    small.advance(0.0)
    drain(small, lambda engine: loads.append(engine.load()))
    assert max(load.running for load in loads) == 2
    assert small.stats.finished == {"length": 5}


def test_a_full_cache_queues_and_the_head_blocks_the_others(request_of: Callable) -> None:
    """Rules 12 and 13: the small request would fit at once, but the big one came first."""
    full = make_engine(blocks=10)
    full.submit(request_of(90, max_tokens=5, request_id="holds 6 blocks"), 0.0)
    full.submit(request_of(100, max_tokens=2, request_id="needs 7"), 0.0)
    full.submit(request_of(10, max_tokens=2, request_id="needs 1"), 0.0)
    full.advance(0.0)
    assert (full.load().running, full.load().waiting) == (1, 2)
    firsts = [output.request_id for output in drain(full) if output.index == 0]
    assert firsts == ["holds 6 blocks", "needs 7", "needs 1"]
    assert full.stats.preemptions == 0


def test_blocks_in_use_need_no_free_blocks_for_a_waiting_request(request_of: Callable) -> None:
    shared = make_engine(blocks=10)
    prompt = list(range(96))
    shared.submit(request_of(prompt, max_tokens=20), 0.0)  # 6 blocks, then a 7th and 8th
    shared.submit(request_of([*prompt, 1, 2, 3], max_tokens=20), 0.0)  # needs 7, of which 6 are in use
    shared.advance(0.0)
    assert shared.load().running == 2
    assert len(drain(shared)) == 40


def test_a_blocked_head_is_admitted_when_a_running_prompt_completes_its_prefix(request_of: Callable) -> None:
    """Nothing is freed in between: each block of the shared prefix that is stored is one that needs no place."""
    shared = make_engine(blocks=12, max_num_batched_tokens=32)
    prompt = list(range(160))
    shared.submit(request_of(prompt, max_tokens=30), 0.0)
    shared.submit(request_of([*prompt, 1], max_tokens=1), 0.0)
    running = []
    drain(shared, lambda engine: running.append(engine.load().running))
    assert running[:6] == [1, 1, 1, 1, 1, 2]


def test_the_last_admitted_sequence_is_preempted_and_recomputed_from_its_first_missing_block(
    request_of: Callable,
) -> None:
    tight = make_engine(blocks=8)
    tight.submit(request_of(48, max_tokens=40, request_id="old"), 0.0)
    tight.submit(request_of(48, max_tokens=40, request_id="young"), 0.0)
    outputs = drain(tight)
    records = {record.request_id: record for record in tight.take_finished()}
    assert records["old"].preemptions == 0
    assert records["young"].preemptions == tight.stats.preemptions > 0
    assert [o.index for o in outputs if o.request_id == "young"] == list(range(40))
    assert tight.stats.prefix_cache_queries == 96  # the lookup after the preemption does not count
    assert records["young"].cached_tokens == 0
    assert tight.load().free_blocks == 8


def test_nothing_is_admitted_in_a_step_that_preempts(request_of: Callable) -> None:
    tight = make_engine(blocks=8)
    for name in ("old", "young"):
        tight.submit(request_of(62, max_tokens=20, request_id=name), 0.0)
    tight.submit(request_of(1, max_tokens=1, request_id="tiny"), 0.0)
    seen = []

    def note(engine: Engine) -> None:
        seen.append((engine.stats.preemptions, engine.load().running, engine.load().waiting))

    drain(tight, note)
    assert (1, 1, 2) in seen
    assert tight.stats.finished == {"length": 3}


def test_without_prefix_caching_nothing_is_stored_or_hit(request_of: Callable) -> None:
    plain = make_engine(enable_prefix_caching=False, blocks=9)
    prompt = list(range(64))
    for now in range(3):
        outputs = serve(plain, [request_of(prompt, max_tokens=30) for _ in range(2)], float(now))
        assert {output.cached_tokens for output in outputs} == {0}
    assert plain.blocks() == []
    assert plain.take_events() == []
    assert plain.load().free_blocks == 9
    assert plain.stats.prefix_cache_queries == 0
    assert plain.stats.preemptions > 0


def test_output_ends_as_the_request_demands(request_of: Callable) -> None:
    script = [9, 2, 9, 5, 9]  # 2 ends a sequence
    cases = [
        ({}, "stop", 2),
        ({"ignore_eos": True}, "length", 5),
        ({"min_tokens": 3}, "length", 5),
        ({"min_tokens": 3, "stop_token_ids": frozenset({5})}, "stop", 4),
        ({"stop_token_ids": frozenset({9})}, "stop", 1),
    ]
    for fields, reason, length in cases:
        stopping = make_engine()
        outputs = serve(stopping, [request_of(4, max_tokens=5, output=script, **fields)])
        assert [output.finish_reason for output in outputs] == [None] * (length - 1) + [reason]
        assert stopping.stats.finished == {reason: 1}


def test_output_ends_at_the_models_length(request_of: Callable) -> None:
    short = make_engine(max_model_len=40)
    outputs = serve(short, [request_of(30, max_tokens=100)])
    assert [output.finish_reason for output in outputs] == [None] * 9 + ["length"]


def test_an_aborted_request_releases_its_blocks_at_once(request_of: Callable) -> None:
    busy = make_engine(max_num_seqs=1)
    busy.submit(request_of(100, max_tokens=50, request_id="running"), 0.0)
    busy.submit(request_of(100, max_tokens=1, request_id="waiting"), 0.0)
    busy.advance(0.0)
    assert busy.abort("running", 0.001)
    assert busy.load().free_blocks == 64
    assert busy.abort("waiting", 0.001)
    assert not busy.abort("waiting", 0.001)
    assert not busy.abort("never seen", 0.001)
    assert drain(busy) == []
    assert [record.finish_reason for record in busy.take_finished()] == ["abort", "abort"]
    assert busy.next_event() is None
    assert len(busy.blocks()) == 6  # its step was under way, its blocks can be hit


def test_an_abort_can_state_that_a_stop_string_was_found(request_of: Callable) -> None:
    running = make_engine()
    running.submit(request_of(4, max_tokens=50, request_id="a"), 0.0)
    running.advance(0.0)
    running.abort("a", 0.1, "stop")
    (record,) = running.take_finished()
    assert (record.finish_reason, running.stats.finished) == ("stop", {"stop": 1})


def test_the_cache_is_reset_only_when_nothing_runs(request_of: Callable) -> None:
    cache = make_engine()
    cache.submit(request_of(40), 0.0)
    cache.advance(0.0)
    assert not cache.reset_prefix_cache()
    drain(cache)
    cache.take_events()
    assert cache.reset_prefix_cache()
    assert cache.blocks() == []
    assert feed_events(cache.take_events()) == [Cleared()]


def test_evictions_in_a_row_are_one_event(request_of: Callable) -> None:
    small = make_engine(blocks=4)
    serve(small, [request_of(48)])
    small.take_events()
    serve(small, [request_of(48)], now=1.0)
    removed, stored = feed_events(small.take_events())
    assert isinstance(removed, Removed)
    assert len(removed.keys) == 2
    assert isinstance(stored, Stored)


def test_the_load_counts_what_a_waiting_prompt_would_have_to_compute(request_of: Callable) -> None:
    busy = make_engine(max_num_seqs=1, max_num_batched_tokens=64)
    known = list(range(160))
    serve(busy, [request_of(known)])
    busy.submit(request_of(200, max_tokens=5), 10.0)
    busy.submit(request_of([*known, 1, 2]), 10.0)
    assert busy.load().prefill_tokens == 200 + 2
    busy.advance(10.0)
    load = busy.load()
    assert (load.running, load.waiting, load.prefill_tokens) == (1, 1, 136 + 2)
    assert (load.free_blocks, load.total_blocks) == (60, 64)


def test_refuses_what_it_cannot_run(request_of: Callable) -> None:
    strict = make_engine(max_model_len=32)
    strict.submit(request_of(4, request_id="a", max_tokens=9), 0.0)
    for request, why in [
        (request_of([]), "empty"),
        (request_of(32), "no room for output"),
        (request_of(4, max_tokens=0), "max_tokens"),
        (request_of(4, request_id="a"), "in use"),
    ]:
        with pytest.raises(RequestRefusedError, match=why):
            strict.submit(request, 0.0)
    with pytest.raises(TokenIdError):
        strict.submit(request_of([-1]), 0.0)
    assert (strict.load().running, strict.load().waiting) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        pytest.param({"blocks": 0}, "blocks", id="no blocks"),
        pytest.param({"max_num_seqs": 65}, "max_num_batched_tokens", id="more sequences than tokens"),
        pytest.param({"max_model_len": 1}, "max_model_len", id="no room for output"),
        pytest.param({"max_model_len": 161}, "lower it to 160 or give the cache 11 blocks", id="longer than the cache"),
        pytest.param({"block_size": 0}, "block_size", id="block size 0"),
    ],
)
def test_refuses_settings_that_contradict_one_another(settings: dict[str, int], names: str) -> None:
    good = {"blocks": 10, "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 160}
    EngineConfig(**good)
    with pytest.raises(EngineConfigError, match=names):
        EngineConfig(**{**good, **settings})
