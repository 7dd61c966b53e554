"""Replaying the records of a live run through engines in virtual time, and how well both agree.

Not covered: the engine itself (tests/worker), and records of real runs (tests/e2e).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.predict import Modelled, agreement, overhead, replay
from bench.prompts import Prompt, prompts
from bench.record import ErrorCause, Record
from bench.simulation import ClusterShape
from bench.workloads import WorkloadSpec, build_workload
from kvcache.profiles import LatencyModel
from kvcache.tokens.tokenizer import load_tokenizer
from worker.emulator.engine.config import EngineConfig

SHAPE = ClusterShape(
    workers=2,
    engine=EngineConfig(blocks=924, max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096),
    latency=LatencyModel(prefill_base=0.005, prefill_block=0.0025, prefill_cached=0.0005, decode=0.015),
    model="m",
)


def asked(count: int) -> list[Prompt]:
    workload = build_workload(WorkloadSpec("hot", limit=count))
    return list(prompts(workload, load_tokenizer("gpt2")))


def answered(prompt: Prompt, sent: float, ttft: float, worker: str) -> Record:
    index = prompt.request.index
    return Record(
        index=index,
        scheduled=sent,
        sent=sent,
        first_token=sent + ttft,
        finished=sent + ttft + 1,
        worker=worker,
        prompt_tokens=len(prompt.tokens),
        cached_tokens=0,
        output_tokens=32,
    )


def test_a_lone_request_takes_its_prefill() -> None:
    (prompt,) = asked(1)
    (modelled,) = replay([answered(prompt, 3.0, 0.3, "a")], [prompt], SHAPE)
    blocks = -(-len(prompt.tokens) // 16)
    assert modelled.modelled == pytest.approx(0.005 + 0.0025 * blocks)
    assert modelled.measured == pytest.approx(0.3)


def test_the_second_request_hits_only_on_the_worker_that_had_the_first() -> None:
    first, second = asked(2)
    alone = replay([answered(first, 0, 0.2, "a"), answered(second, 5, 0.2, "b")], [first, second], SHAPE)
    together = replay([answered(first, 0, 0.2, "a"), answered(second, 5, 0.2, "a")], [first, second], SHAPE)
    tail = -(-len(second.tokens) // 16) - 1024 // 16
    assert together[1].modelled == pytest.approx(0.005 + 0.0025 * tail)
    assert alone[1].modelled > 4 * together[1].modelled


def test_a_request_waits_for_the_one_before_it() -> None:
    first, second = asked(2)
    queued = replay([answered(first, 0, 0.2, "a"), answered(second, 0.001, 0.2, "a")], [first, second], SHAPE)
    assert queued[1].modelled > queued[0].modelled - 0.001


def test_requests_without_an_answer_are_left_out() -> None:
    first, second = asked(2)
    failed = replace(answered(second, 1, 0.2, "a"), error=ErrorCause.UNAVAILABLE)
    assert [m.index for m in replay([answered(first, 0, 0.2, "a"), failed], [first, second], SHAPE)] == [0]


def test_agreement_counts_what_lies_within_the_tolerance() -> None:
    close = [Modelled(i, "a", 0.1029, 0.1) for i in range(3)] + [Modelled(3, "a", 0.2, 0.1)]
    figures = agreement(close)
    assert figures.within == 0.75
    assert figures.relative_error_p50 == pytest.approx(0.029)
    assert not figures.quantiles_within
    assert agreement(close[:3]).quantiles_within


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="no request of this run was answered"):
        agreement([])


def test_the_overhead_is_found_among_outliers() -> None:
    """2 ms and 3 us a token, and every fifth request misses the start of a step."""
    lengths = [200 + 97 * index % 1800 for index in range(60)]
    late = [0.015 * (index % 5 == 0) for index in range(60)]
    modelled = [Modelled(i, "a", 0.102 + 3e-6 * lengths[i] + late[i], 0.1) for i in range(60)]
    record = answered(asked(1)[0], 0, 0.1, "a")
    records = [replace(record, index=i, prompt_tokens=lengths[i]) for i in range(60)]
    found = overhead(modelled, records)
    assert found.fixed == pytest.approx(0.002, rel=0.1)
    assert found.token == pytest.approx(3e-6, rel=0.1)
    assert found.network == found.fixed / 2


def test_prompts_of_one_length_have_a_fixed_overhead_only() -> None:
    record = answered(asked(1)[0], 0, 0.1, "a")
    records = [replace(record, index=i) for i in range(3)]
    found = overhead([Modelled(i, "a", 0.103, 0.1) for i in range(3)], records)
    assert (found.fixed, found.token) == (pytest.approx(0.003), 0.0)
    with pytest.raises(ValueError, match="no request of this run was answered"):
        overhead([], [])


def test_noise_among_prompts_of_like_lengths_does_not_become_a_part_below_zero() -> None:
    """A slope that is far too steep leaves the overhead as it is at the lengths that were measured."""
    lengths = [1000 + index for index in range(9)]
    modelled = [Modelled(i, "a", 0.104 + 0.0002 * (i - 4), 0.1) for i in range(9)]
    record = answered(asked(1)[0], 0, 0.1, "a")
    records = [replace(record, index=i, prompt_tokens=lengths[i]) for i in range(9)]
    found = overhead(modelled, records)
    assert found.fixed == 0.0
    assert found.token * 1004 == pytest.approx(0.004, rel=0.01)
