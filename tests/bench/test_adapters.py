"""The workload of several LoRA adapters, and what sharing workers costs each of them.

Not covered: the traffic of one adapter, which is that of `rag` (test_workloads.py).
"""

from __future__ import annotations

from collections import Counter

import pytest

from bench.adapters import by_adapter, hit_rate, rows
from bench.prompts import prompts
from bench.record import Record
from bench.workloads import WorkloadSpec, build_workload
from bench.workloads.adapters import ADAPTERS, adapters, of_adapter
from kvcache.tokens.tokenizer import load_tokenizer

pytestmark = pytest.mark.simulation


def test_the_requests_of_the_adapters_are_mixed_and_each_in_order() -> None:
    spec = WorkloadSpec("adapters", limit=100, rate=12.0)
    mixed = list(build_workload(spec).requests())
    assert [request.index for request in mixed] == list(range(100))
    assert [request.at for request in mixed] == sorted(request.at for request in mixed)
    assert Counter(request.body["model"] for request in mixed) == {"sql": 34, "law": 33, "poems": 33}
    for name in ADAPTERS:
        own = [request.body for request in of_adapter(spec, name).requests()]
        assert [request.body for request in mixed if request.body["model"] == name] == own


def test_prompts_are_scoped_by_their_adapter() -> None:
    found = prompts(adapters(WorkloadSpec("adapters", limit=6)), load_tokenizer("gpt2"))
    assert all(prompt.scope.adapter == prompt.request.body["model"] for prompt in found)


def test_hit_rates_are_sums_over_the_requests_of_an_adapter() -> None:
    spec = WorkloadSpec("adapters", limit=30)
    asked = [str(request.body["model"]) for request in adapters(spec).requests()]
    records = [Record(index, 0.0, 0.0, prompt_tokens=100, cached_tokens=index) for index in range(30)]
    expected = {
        name: sum(index for index, model in enumerate(asked) if model == name) / (100 * asked.count(name))
        for name in ADAPTERS
    }
    assert by_adapter(spec, records) == pytest.approx(expected)
    assert hit_rate([]) == 0.0


def test_an_adapter_is_served_as_well_as_by_a_cluster_of_its_own() -> None:
    """With so few requests most prompts are still new, and the order decides more: within 4 points, on both sides."""
    measured = list(rows(WorkloadSpec("adapters", limit=150, rate=24.0), load_tokenizer("gpt2")))
    assert [name for name, _, _ in measured] == list(ADAPTERS)
    for _, shared, own in measured:
        assert own > 0.1
        assert shared == pytest.approx(own, abs=0.04)
