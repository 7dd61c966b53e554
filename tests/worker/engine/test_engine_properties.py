"""The engine's invariants, for random requests at random times.

Not covered: that these are vLLM's decisions (`test_scheduling.py`, `test_captures.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.feed import Cleared, Event, Removed, Stored, Tier
from kvcache.profiles import LatencyModel
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest, FinishedRequest, Output
from worker.emulator.engine.scheduler import Scheduler

LATENCY = LatencyModel(prefill_base=1 / 16, prefill_block=1 / 32, prefill_cached=1 / 128, decode=1 / 8)


class Echo:
    """The index as token, hence equal blocks for equal prompts; ends where it is told."""

    def __init__(self, ends_at: int) -> None:
        self.ends_at = ends_at

    def token(self, index: int) -> int | None:
        return 2 if index == self.ends_at else 100 + index


@dataclass
class Plan:
    at: float
    prompt: list[int]
    max_tokens: int
    ends_at: int
    abort_after: float | None


# Prompts share prefixes of two families, often to a whole number of blocks: duplicates, hits in use and hits that are
# free all occur.
prompts = st.builds(
    lambda family, shared, tail, salt: [1000 * family + i for i in range(shared)] + [9000 + salt] * tail,
    st.integers(1, 2),
    st.sampled_from([0, 4, 8, 12, 16, 24, 30, 32]),
    st.sampled_from([1, 3, 4, 4, 8, 12]),
    st.integers(0, 1),
)
plans = st.lists(
    st.builds(
        Plan,
        st.integers(0, 24).map(lambda eighths: eighths / 8),
        prompts,
        st.integers(1, 20),
        st.integers(0, 30),
        st.none() | st.integers(0, 16).map(lambda eighths: eighths / 8),
    ),
    min_size=1,
    max_size=14,
)
configs = st.builds(
    lambda blocks, budget, seqs, cpu_blocks: EngineConfig(
        block_size=4,
        blocks=blocks,
        max_num_batched_tokens=max(budget, seqs),
        max_num_seqs=seqs,
        max_model_len=64,
        eos_token_id=2,
        cpu_blocks=cpu_blocks,
        cpu_block_seconds=1 / 64,
    ),
    st.integers(16, 40),
    st.sampled_from([4, 7, 16, 64, 200]),
    st.integers(1, 6),
    st.sampled_from([0, 0, 3, 12, 40]),
)


@dataclass
class Run:
    engine: Engine
    outputs: list[Output]
    finished: list[FinishedRequest]
    events: list[Event]


def play(config: EngineConfig, plans: list[Plan]) -> Run:
    """Drive an engine through the plan; check at each event what must hold at each moment."""
    run = Run(Engine(config, LATENCY), [], [], [])
    engine = run.engine
    actions = []
    for number, plan in enumerate(sorted(plans, key=lambda plan: plan.at)):
        request = EngineRequest(f"r{number:02}", plan.prompt, plan.max_tokens, Echo(plan.ends_at))
        actions.append((plan.at, number, request, True))
        if plan.abort_after is not None:
            actions.append((plan.at + plan.abort_after, number, request, False))
    actions.sort(key=lambda action: (action[0], action[1], not action[3]))
    replayed: Counter[bytes] = Counter()
    on_cpu: Counter[bytes] = Counter()

    def check() -> None:
        for event in (events := feed_events(engine.take_events())):
            match event:
                case Stored(_, keys, Tier.CPU):
                    on_cpu.update(keys)
                    assert max(on_cpu.values()) == 1
                case Removed(keys, Tier.CPU):
                    assert all(on_cpu[key] == 1 for key in keys)
                    on_cpu.subtract(keys)
                case Stored(parent, keys):
                    assert parent is None or replayed[parent] > 0  # prefix-closed at every moment
                    replayed.update(keys)
                case Removed(keys):
                    replayed.subtract(keys)
                    assert all(replayed[key] >= 0 for key in keys)
                case Cleared():
                    replayed.clear()
        run.events += events
        assert on_cpu.total() <= config.cpu_blocks
        assert Counter(key for held in engine.elsewhere() for key in held.keys) == +on_cpu
        listed = engine.blocks()
        assert Counter(key for key, _ in listed) == +replayed
        seen = set()
        for key, parent in listed:
            assert parent is None or parent in seen
            seen.add(key)
        load = engine.load()
        assert load.running <= config.max_num_seqs
        assert 0 <= load.free_blocks <= load.total_blocks
        assert load.prefill_tokens >= 0

    def until(moment: float) -> None:
        while (due := engine.next_event()) is not None and due <= moment:
            run.outputs += engine.advance(due)
            check()

    for at, _, request, submits in actions:
        until(at)
        if submits:
            engine.submit(request, at)
        else:
            engine.abort(request.request_id, at)
        check()
    until(1e9)
    run.finished = engine.take_finished()
    return run


@settings(max_examples=80, deadline=None)
@given(config=configs, plans=plans)
def test_every_request_ends_and_nothing_is_left(config: EngineConfig, plans: list[Plan]) -> None:
    run = play(config, plans)
    stats, load = run.engine.stats, run.engine.load()
    assert (load.running, load.waiting, load.prefill_tokens) == (0, 0, 0)
    assert load.free_blocks == load.total_blocks  # no block with a reference
    assert len(run.finished) == len(plans)
    assert max(stats.step_tokens) <= config.max_num_batched_tokens
    assert sum(stats.step_tokens.values()) == stats.steps
    assert stats.generation_tokens == len(run.outputs) == sum(record.output_tokens for record in run.finished)

    records = {record.request_id: record for record in run.finished}
    by_request: dict[str, list[Output]] = {}
    for output in run.outputs:
        by_request.setdefault(output.request_id, []).append(output)
    for number, plan in enumerate(sorted(plans, key=lambda plan: plan.at)):
        record = records[f"r{number:02}"]
        outputs = by_request.get(record.request_id, [])
        assert [output.index for output in outputs] == list(range(record.output_tokens))
        assert [o.token for o in outputs] == [Echo(plan.ends_at).token(i) for i in range(len(outputs))]
        if record.finish_reason != "abort":
            room = config.max_model_len - len(plan.prompt)
            length = min(plan.max_tokens, plan.ends_at + 1, room)
            assert record.output_tokens == length
            assert record.finish_reason == outputs[-1].finish_reason
            assert (record.finish_reason == "stop") == (plan.ends_at + 1 == length)
        else:
            assert plan.abort_after is not None

    # First come, first served: requests are first scheduled in the order of their submission, unless some load blocks.
    scheduled = [records[name].times.scheduled for name in sorted(records)]
    started = [at for at in scheduled if at is not None]
    assert started == sorted(started) or stats.loaded_blocks
    cached = sum(record.cached_tokens for record in run.finished)
    assert stats.loaded_blocks * 4 <= stats.external_cache_hits + 4 * stats.loaded_blocks * stats.preemptions
    assert stats.prefix_cache_hits + stats.external_cache_hits == cached
    assert all(later.at >= earlier.at for earlier, later in zip(run.outputs, run.outputs[1:], strict=False))


@settings(max_examples=80, deadline=None)
@given(config=configs, plans=plans)
def test_looking_a_blocked_prompt_up_less_often_changes_nothing(config: EngineConfig, plans: list[Plan]) -> None:
    """The head of the queue is looked up again only when that can matter: the same as at every step, as vLLM does."""
    lazy = play(config, plans)
    with mock.patch.object(Scheduler, "_may_fit", return_value=True):
        eager = play(config, plans)
    assert lazy.outputs == eager.outputs
    assert lazy.events == eager.events
    assert lazy.finished == eager.finished
