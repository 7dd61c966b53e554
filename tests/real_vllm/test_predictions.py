"""Engine, agent and router together: the router predicts the cached tokens that the engine reports.

A prediction holds for a request that is sent when nothing else is under way: every step of the engine has ended and was
published, and agent and router have applied it. What was changed between two steps (a reset of the cache) is published
with the next step, so one request may be predicted wrongly after it.

Not covered: predicted times, several engines, engines on a GPU, and faults on the way (`test_lifecycle.py`).
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.real_vllm.bed import Bed, bed
from tests.real_vllm.mixes import EveryKind
from tests.real_vllm.served import Served
from tests.router.conftest import StartRouter

pytestmark = [pytest.mark.process, pytest.mark.real_vllm, pytest.mark.timeout(1800)]


async def predictions(one: Bed, seed: int, number: int) -> None:
    made = EveryKind.of(one.served, seed)
    counts, wrong, cached = Counter[tuple[str, str]](), [], 0
    for _ in range(number):
        request = made.next()
        outcome = await one.ask(request.path, request.body)
        made.answered(request, outcome.text)
        counts[request.kind, outcome.verdict] += 1
        cached += outcome.cached or 0
        if outcome.verdict == "different":
            wrong.append((outcome.predicted, outcome.cached, request))
    verdicts = Counter[str]()
    for (_, verdict), count in counts.items():
        verdicts[verdict] += count
    print(f"\nseed {seed}: {dict(verdicts)}, {cached} cached tokens; {dict(counts)}")  # noqa: T201
    assert not wrong, wrong[:3]
    assert verdicts["equal"] > number / 2
    assert cached > 0


async def test_predicted_is_reported(served: Served, start_router: StartRouter, seed: int, number: int) -> None:
    async with bed(served, start_router) as one:
        await predictions(one, seed, number)
