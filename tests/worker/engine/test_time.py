"""Logical time: the latencies of an idle engine are exact, and late or rare calls change nothing.

Not covered: real time (`tests/worker/test_timer.py`), and whether the profile fits a GPU (docs/profiles.md).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.profiles import LatencyModel, blocks_to_compute
from tests.worker.engine.conftest import drain, make_engine, serve
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest, Output

MS = 1e-3
BINARY = LatencyModel(prefill_base=1 / 16, prefill_block=1 / 32, prefill_cached=1 / 128, decode=1 / 8)
"""Fractions of two: sums are exact, so times can be compared with ==."""


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300, 1000])
def test_unloaded_ttft_is_the_base_and_the_blocks(request_of: Callable, length: int) -> None:
    idle = make_engine()
    (output,) = serve(idle, [request_of(length)], now=50.0)
    assert output.at - 50.0 == pytest.approx(5.0 * MS + 2.5 * MS * -(-length // 16), abs=1e-9)


@pytest.mark.parametrize("budget", [8, 16, 24, 64, 100])
def test_chunks_together_take_as_long_as_the_whole(request_of: Callable, budget: int) -> None:
    chunked = make_engine(BINARY, max_num_batched_tokens=budget)
    (output,) = serve(chunked, [request_of(300)])
    assert output.at == BINARY.prefill(19)


def test_a_cached_prompt_takes_the_cached_time(request_of: Callable) -> None:
    warm = make_engine()
    prompt = list(range(100))
    serve(warm, [request_of(prompt)])
    for now, tokens in enumerate((prompt, prompt[:97], prompt[:64]), start=10):
        (output,) = serve(warm, [request_of(tokens)], now=float(now))
        assert output.at - now == pytest.approx(0.5 * MS)


@given(length=st.integers(1, 200), warm=st.integers(1, 200), budget=st.integers(8, 64))
def test_a_prefill_takes_the_time_of_the_latency_model(length: int, warm: int, budget: int) -> None:
    engine = Engine(EngineConfig(blocks=64, max_num_batched_tokens=budget, max_num_seqs=8, max_model_len=1024), BINARY)
    prompt = list(range(200))
    engine.submit(EngineRequest("warm", prompt[:warm], 1, Ready()), 0.0)
    engine.advance(100.0)
    engine.submit(EngineRequest("a", prompt[:length], 1, Ready()), 128.0)
    (output,) = engine.advance(256.0)
    expected = BINARY.prefill(blocks_to_compute(length, output.cached_tokens, 16))
    assert output.at - 128.0 == expected


def test_each_further_token_takes_a_decode_step(request_of: Callable) -> None:
    idle = make_engine()
    outputs = serve(idle, [request_of(16, max_tokens=11), request_of(16, max_tokens=11)])
    by_request = [[o.at for o in outputs if o.request_id == name] for name in {o.request_id for o in outputs}]
    for times in by_request:
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert gaps == pytest.approx([15 * MS] * 10)


def test_a_step_that_prefills_and_decodes_takes_the_longer_of_the_two(request_of: Callable) -> None:
    mixed = make_engine(BINARY)
    mixed.submit(request_of(16, max_tokens=3, request_id="a"), 0.0)
    mixed.advance(0.0)
    mixed.submit(request_of(16, max_tokens=1, request_id="small"), 0.001)  # 3/32 < 1/8
    mixed.submit(request_of(160, max_tokens=1, request_id="large"), 0.1)  # 12/32 > 1/8
    at = {(o.request_id, o.index): o.at for o in drain(mixed)}
    start = BINARY.prefill(1)
    assert at["a", 0] == start
    assert at["a", 1] == at["small", 0] == start + BINARY.decode
    assert at["a", 2] == at["large", 0] == start + BINARY.decode + BINARY.prefill(10)


def test_the_record_has_the_intervals_of_a_request(request_of: Callable) -> None:
    busy = make_engine(BINARY, max_num_seqs=1)
    busy.submit(request_of(16, max_tokens=2), 0.0)
    busy.submit(request_of(32, max_tokens=5, request_id="b"), 0.0)
    drain(busy)
    _, record = busy.take_finished()
    times = record.times
    assert times.queue == BINARY.prefill(1) + BINARY.decode
    assert times.prefill == BINARY.prefill(2)
    assert times.decode == 4 * BINARY.decode
    assert times.inference == times.prefill + times.decode
    assert times.ttft == times.queue + times.prefill
    assert times.e2e == times.ttft + times.decode
    assert record.time_per_output_token == BINARY.decode
    assert (record.prompt_tokens, record.output_tokens, record.finish_reason) == (32, 5, "length")


def test_an_idle_engine_has_no_event(request_of: Callable) -> None:
    idle = make_engine()
    assert idle.next_event() is None
    idle.submit(request_of(16), 3.0)
    assert idle.next_event() == 3.0
    assert idle.advance(3.0) == []
    assert idle.next_event() == pytest.approx(3.0075)
    drain(idle)
    assert idle.next_event() is None
    assert idle.advance(100.0) == []
    assert idle.stats.steps == 1
    assert idle.stats.busy_seconds == pytest.approx(0.0075)


def test_work_starts_no_earlier_than_it_arrives(request_of: Callable) -> None:
    idle = make_engine(BINARY)
    idle.submit(request_of(16), 5.0)
    (output,) = idle.advance(900.0)
    assert output.at == 5.0 + BINARY.prefill(1)
    idle.submit(request_of(16), 901.0)
    (output,) = idle.advance(902.0)
    assert output.at == 901.0 + BINARY.prefill(1)


def test_what_arrives_at_the_same_moment_shares_the_step(request_of: Callable) -> None:
    idle = make_engine(BINARY)
    for _ in range(3):
        idle.submit(request_of(16), 1.0)
    assert {output.at for output in idle.advance(9.0)} == {1.0 + BINARY.prefill_base * 3 + BINARY.prefill_block * 3}


def test_what_arrives_during_a_step_waits_for_the_next(request_of: Callable) -> None:
    idle = make_engine(BINARY)
    idle.submit(request_of(160), 0.0)
    idle.submit(request_of(16), 0.125)
    first, second = idle.advance(9.0)
    assert first.at == BINARY.prefill(10)
    assert second.at == first.at + BINARY.prefill(1)


def test_a_step_whose_requests_are_all_aborted_still_takes_its_time(request_of: Callable) -> None:
    idle = make_engine(BINARY)
    idle.submit(request_of(160, request_id="gone"), 0.0)
    idle.advance(0.0)
    idle.abort("gone", 0.001)
    idle.submit(request_of(16), 0.002)
    (output,) = idle.advance(9.0)
    assert output.at == BINARY.prefill(10) + BINARY.prefill(1)


class Ready:
    def token(self, index: int) -> int | None:
        return index


class Slow:
    """Ready only at every third question."""

    def __init__(self) -> None:
        self.asked = 0

    def token(self, index: int) -> int | None:
        self.asked += 1
        return None if self.asked % 3 else index


def test_a_source_that_is_not_ready_is_asked_again_after_the_next_step(request_of: Callable) -> None:
    waiting = make_engine(BINARY)
    waiting.submit(request_of(16, max_tokens=3, source=Slow()), 0.0)
    waiting.submit(request_of(16, max_tokens=3), 0.0)
    outputs = waiting.advance(99.0)
    slow = [output for output in outputs if output.request_id == outputs[-1].request_id]
    assert [output.token for output in slow] == [0, 1, 2]
    start = 2 * BINARY.prefill(1)
    assert [output.at for output in slow] == [start + steps * BINARY.decode for steps in (2, 5, 8)]
    assert len(outputs) == 6
    assert waiting.load().free_blocks == 64


arrivals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 200), st.integers(1, 20), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(arrivals=arrivals, interval=st.sampled_from([0.05, 0.3, 1.7, 1e9]))
def test_rare_calls_change_nothing(arrivals: list, interval: float) -> None:
    """Driven at each event, and driven now and then: the same tokens at the same times, the same cache."""

    def build() -> Engine:
        limits = EngineConfig(blocks=24, max_num_batched_tokens=48, max_num_seqs=4, max_model_len=384)
        return Engine(limits, BINARY)

    plan = []
    for number, (quarter, length, output, family, aborted) in enumerate(sorted(arrivals)):
        request = EngineRequest(f"r{number}", [family * 1000 + i for i in range(length)], output, Ready())
        plan.append((quarter / 4, number, "submit", request))
        if aborted:
            plan.append((quarter / 4 + 1.125, number, "abort", request))
    plan.sort(key=lambda entry: (entry[0], entry[1]))

    def drive(engine: Engine, prompt: bool) -> list[Output]:
        outputs: list[Output] = []
        polled = 0.0
        for at, _, action, request in plan:
            if prompt:
                while (due := engine.next_event()) is not None and due < at:
                    outputs += engine.advance(due)
            elif at - polled > interval:
                polled = at - interval / 2
                outputs += engine.advance(polled)
            if action == "submit":
                engine.submit(request, at)
            else:
                engine.abort(request.request_id, at)
        if prompt:
            while (due := engine.next_event()) is not None:
                outputs += engine.advance(due)
        return outputs + engine.advance(1e6)

    often, rarely = build(), build()
    assert drive(often, prompt=True) == drive(rarely, prompt=False)
    assert feed_events(often.take_events()) == feed_events(rarely.take_events())
    assert often.blocks() == rarely.blocks()
    assert often.take_finished() == rarely.take_finished()
    assert often.stats == rarely.stats


@settings(max_examples=30)
@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(2, 12)), min_size=1, max_size=5))
def test_a_decode_step_takes_what_its_sequences_and_their_contexts_add(lengths: list[tuple[int, int]]) -> None:
    """The whole run against a sum over steps, each of which is worked out from the lengths alone."""
    latency = LatencyModel(0.0, 0.0, 0.0, 1 / 8, decode_sequence=1 / 64, decode_token=1 / 1024)
    engine = Engine(EngineConfig(blocks=64, max_num_batched_tokens=512, max_num_seqs=8, max_model_len=1024), latency)
    for number, (prompt, output) in enumerate(lengths):
        engine.submit(EngineRequest(str(number), [1000 * number + n for n in range(prompt)], output, Ready()), 0.0)
    engine.advance(0.0)  # the prefills take no time, and give each its first token
    last = {}
    while (due := engine.next_event()) is not None:
        for output in engine.advance(due):
            last[output.request_id] = output.at
    expected, at = {}, 0.0
    for token in range(1, max(output for _, output in lengths)):
        decoding = [(prompt, number) for number, (prompt, output) in enumerate(lengths) if output > token]
        at += 1 / 8 + sum(1 / 64 + (prompt + token) / 1024 for prompt, _ in decoding)
        expected |= {str(number): at for _, number in decoding}
    assert last == expected
