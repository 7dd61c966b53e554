"""Every figure that people are shown of a cluster's caches, against sums over what the clients were answered."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
from rich.console import Console

from bench.run import BenchOptions, measure
from bench.workloads import WorkloadSpec, build_workload
from controller.local.view import observe
from controller.status.compute import hit_rate_permille
from controller.status.report import parse_report
from deploy.helm.dashboards import FLEET, load, queries
from kvcluster.display import status_table
from tests.e2e.conftest import StartCluster
from tests.e2e.support import ClusterUnderTest

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

DOCUMENTS = [f"Document {number}. " + f"Fact {number} of it, and what follows from that. " * 12 for number in range(3)]


RATE = re.compile(
    r"sum\(rate\((?P<part>\w+)\{[^}]*\}\[\$__rate_interval\]\)\) / "
    r"sum\(rate\((?P<whole>\w+)\{[^}]*\}\[\$__rate_interval\]\)\)"
)


def is_hit_rate(expression: str) -> bool:
    return "actual_cached" in expression and "reported_prompt" in expression


async def usage_of(cluster: ClusterUnderTest, path: str, **fields: Any) -> dict[str, Any] | None:
    """What the answer to one request states, from its bytes alone."""
    if fields.get("stream"):
        fields.setdefault("stream_options", {"include_usage": True})
    answer = await cluster.client.post(cluster.url + path, json={"max_tokens": 4, **fields})
    assert answer.status_code == 200
    lines = [line[6:] for line in answer.content.splitlines() if line.startswith(b"data: {")] or [answer.content]
    return next((usage for line in reversed(lines) if (usage := orjson.loads(line).get("usage"))), None)


async def ask_all(cluster: ClusterUnderTest) -> tuple[int, int]:
    """Requests of every kind; (prompt, cached) tokens of those whose answers report both."""
    usages = []
    for document in DOCUMENTS:
        for stream in (True, False, True):
            usages.append(await usage_of(cluster, "/v1/completions", prompt=document, stream=stream))
        messages = [{"role": "user", "content": document}]
        for stream in (False, True):
            usages.append(await usage_of(cluster, "/v1/chat/completions", messages=messages, stream=stream))
    for number in range(4):  # nothing of these is cached, and their answers say 0
        usages.append(await usage_of(cluster, "/v1/completions", prompt=f"{number} " * 40, stream=number % 2 == 0))
    options = {"include_usage": True, "continuous_usage_stats": True}
    usages.append(await usage_of(cluster, "/v1/completions", prompt="a b c", stream=True, stream_options=options))
    told = [
        usage
        for usage in usages
        if usage and (usage.get("prompt_tokens_details") or {}).get("cached_tokens") is not None
    ]
    assert any(usage["prompt_tokens_details"]["cached_tokens"] == 0 for usage in told)
    return sum(usage["prompt_tokens"] for usage in told), sum(u["prompt_tokens_details"]["cached_tokens"] for u in told)


async def test_all_hit_rates_are_those_of_the_answers(start_cluster: StartCluster) -> None:
    async with start_cluster(workers=1) as cluster:
        prompt, cached = await ask_all(cluster)
        assert 0 < cached < prompt
        management = cluster.local.management_url
        page = (await cluster.client.get(f"{management}/status")).content
        report = parse_report(page)
        assert (report.prompt_tokens, report.cached_tokens) == (prompt, cached)
        assert hit_rate_permille([report], None) == round(1000 * cached / prompt), "kubectl's column and explain's"
        # Dashboards: over a window that holds all requests a rate is the counter over its length, which cancels out.
        rates = [RATE.fullmatch(query.expression) for query in queries(load(FLEET)) if is_hit_rate(query.expression)]
        assert rates
        for rate in rates:
            assert rate is not None
            counters = [await cluster.metric(management, rate[name]) for name in ("part", "whole")]
            assert counters == [cached, prompt]
        # `kvcluster up` reads the engines.
        view = await observe(cluster.local, cluster.client)
        assert view.workers[0].hit_rate == cached / prompt
        table = status_table("", [view.workers[0].process], {view.workers[0].process.name: view.workers[0]})
        drawn = re.search(r"([\d.]+)%", "\n".join(str(cell) for column in table.columns for cell in column.cells))
        assert drawn is not None
        assert drawn[1] == f"{100 * cached / prompt:.1f}"
        # What `kvcluster bench` says is what the router counted meanwhile.
        workload = build_workload(WorkloadSpec("rag", limit=40, rate=100))
        result, driven = await measure(cluster.url, workload, BenchOptions(WorkloadSpec("rag")), Console(quiet=True))
        assert result.errors == 0
        after = parse_report((await cluster.client.get(f"{management}/status")).content)
        new_prompt, new_cached = after.prompt_tokens - prompt, after.cached_tokens - cached
        assert result.hit_rate == new_cached / new_prompt
        assert result.computed_tokens == new_prompt - new_cached
        assert sum(record.prompt_tokens or 0 for record in driven.records) == new_prompt
