"""What flow control gains and costs in simulated workloads: another tenant's burst, and loads that leave room.

Not covered: the rules one by one (tests/router/core/test_flow.py), the event loop (tests/router/test_admission.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from statistics import median

import pytest

from bench.prompts import Prompt
from bench.simulation import ClusterShape, Delays, Simulation
from bench.workloads import COMPLETIONS, TimedRequest
from kvcache.keys import DEFAULT_SCOPE
from kvcache.profiles import profile
from router.core.decision import Caller
from router.core.flow import FlowPolicy
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

GPU = profile("llama-2-13b-a100-40gb")
BURST_AT, INTERACTIVE = 20.0, "interactive"


def shape(workers: int) -> ClusterShape:
    engine = EngineConfig(blocks=GPU.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    return ClusterShape(workers, engine, GPU.latency, GPU.model)


def ignore(sent: int, answered: int, failed: int) -> None:
    pass


def tenant(prompt: Prompt) -> Caller:
    return Caller(prompt.request.body["tenant"])


def workload(seed: int, *, burst: int) -> Iterator[Prompt]:
    """An interactive tenant asks once a second, with a system prompt that is cached; another one sends `burst` requests
    of 400 tokens at one moment."""
    random = Random(seed)
    system = [random.randrange(50_000) for _ in range(512)]
    requests = [(float(second) + random.random(), INTERACTIVE, 0) for second in range(60)]
    requests += [(BURST_AT + random.random() * 0.1, "batch", number) for number in range(burst)]
    for index, (at, name, _) in enumerate(sorted(requests)):
        own = [random.randrange(50_000) for _ in range(96 if name == INTERACTIVE else 400)]
        tokens = system + own if name == INTERACTIVE else own
        body = {"tenant": name}
        yield Prompt(TimedRequest(index, at, COMPLETIONS, body, 16), tokens, DEFAULT_SCOPE)


def ttft(seed: int, *, burst: int, flow: FlowPolicy | None) -> tuple[float, float, float]:
    """Median and worst time to the first token of the interactive tenant during the burst, and when that is done."""
    simulation = Simulation(shape(4), "cache_aware", Delays(), flow=flow, caller=tenant)
    coming = list(workload(seed, burst=burst))
    records = simulation.run(coming, ignore)
    assert len(records) == len(coming)
    assert not any(record.error for record in records)
    names = {prompt.request.index: prompt.request.body["tenant"] for prompt in coming}
    times = [
        record.first_token - record.sent
        for record in records
        if names[record.index] == INTERACTIVE and record.sent >= BURST_AT and record.first_token is not None
    ]
    during = times[:10]
    done = max((record.finished or 0.0 for record in records if names[record.index] != INTERACTIVE), default=0.0)
    return median(during), max(during), done


def test_another_tenants_burst_no_longer_delays_an_interactive_one() -> None:
    """Without flow control its requests wait behind the whole burst, for more than 50 times as long as alone; with it
    for what is being computed. The burst is done as soon."""
    alone, _, _ = ttft(1, burst=0, flow=None)
    before, _, done_before = ttft(1, burst=400, flow=None)
    after, worst, done_after = ttft(1, burst=400, flow=FlowPolicy())

    assert before > 50 * alone
    assert after <= 3 * alone
    assert worst < 0.15
    assert done_after <= 1.02 * done_before


def test_where_no_worker_is_busy_nothing_changes() -> None:
    coming = list(workload(1, burst=0))
    without = Simulation(shape(4), "cache_aware", Delays()).run(coming, ignore)
    assert (
        Simulation(shape(4), "cache_aware", Delays(), flow=FlowPolicy(), caller=tenant).run(coming, ignore) == without
    )
