"""Figures that people are shown of a cluster equal sums over what its clients were answered, and over the workers'
caches.

Covered: hit rates (`/status`, kubectl's column, the dashboard, `kvcluster up`, `top`, `metrics`, `bench`), decisions,
requests, tokens, blocks and requests in flight, in the metrics, in `/status` and in `kvcluster up`.

Not covered: times (their histograms are only counted here; tests/router/test_figures.py has them on a virtual clock),
figures of failures (tests/router/test_figures.py), and what `kvcluster explain` adds up (tests/kvcluster/explain).
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from rich.console import Console

from bench.result import summarise
from bench.run import LiveOptions, measure
from bench.workloads import WorkloadSpec, build_workload
from controller.local.view import observe
from controller.status.compute import hit_rate_permille
from controller.status.report import parse_report
from deploy.monitoring.fleet import DASHBOARD as FLEET
from kvcluster.commands.metrics import collect
from kvcluster.display import status_table
from tests.e2e.support import ClusterUnderTest, StartCluster
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

DOCUMENTS = [f"Document {number}. " + f"Fact {number} of it, and what follows from that. " * 12 for number in range(3)]


RATE = re.compile(
    r"sum \(rate\((?P<part>\w+)\{[^}]*\}\[\$__rate_interval\]\)\) / "
    r"sum \(rate\((?P<whole>\w+)\{[^}]*\}\[\$__rate_interval\]\)\)"
)


def is_hit_rate(expression: str) -> bool:
    return "actual_cached" in expression and "reported_prompt" in expression


@dataclass(frozen=True)
class Answer:
    """What a client was told in one answer, from its headers and bytes alone."""

    worker: str
    reason: str
    matched_blocks: int
    streamed: bool
    usage: dict[str, Any] | None

    @property
    def cached(self) -> int | None:
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        return details.get("cached_tokens")


async def ask(cluster: ClusterUnderTest, path: str, **fields: Any) -> Answer:
    if fields.get("stream"):
        fields.setdefault("stream_options", {"include_usage": True})
    answer = await cluster.client.post(cluster.url + path, json={"max_tokens": 4, **fields})
    assert answer.status_code == 200
    lines = [line[6:] for line in answer.content.splitlines() if line.startswith(b"data: {")] or [answer.content]
    usage = next((found for line in reversed(lines) if (found := orjson.loads(line).get("usage"))), None)
    told = {name: answer.headers[f"x-kvcluster-{name}"] for name in ("worker", "reason", "matched-blocks")}
    return Answer(told["worker"], told["reason"], int(told["matched-blocks"]), bool(fields.get("stream")), usage)


async def ask_all(cluster: ClusterUnderTest) -> list[Answer]:
    """Requests of every kind, one after another."""
    answers = []
    for document in DOCUMENTS:
        for stream in (True, False, True):
            answers.append(await ask(cluster, "/v1/completions", prompt=document, stream=stream))
        messages = [{"role": "user", "content": document}]
        for stream in (False, True):
            answers.append(await ask(cluster, "/v1/chat/completions", messages=messages, stream=stream))
    for number in range(4):  # nothing of these is cached, and their answers say 0
        answers.append(await ask(cluster, "/v1/completions", prompt=f"{number} " * 40, stream=number % 2 == 0))
    options = {"include_usage": True, "continuous_usage_stats": True}
    answers.append(await ask(cluster, "/v1/completions", prompt="a b c", stream=True, stream_options=options))
    return answers


def sums(answers: list[Answer]) -> tuple[int, int]:
    """(prompt, cached) tokens of the answers that report both."""
    told = [answer for answer in answers if answer.usage and answer.cached is not None]
    assert any(answer.cached == 0 for answer in told)
    return sum(answer.usage["prompt_tokens"] for answer in told), sum(answer.cached for answer in told)


async def test_all_hit_rates_are_those_of_the_answers(start_cluster: StartCluster) -> None:
    async with start_cluster(workers=1) as cluster:
        prompt, cached = sums(await ask_all(cluster))
        assert 0 < cached < prompt
        management = cluster.local.management_url
        page = (await cluster.client.get(f"{management}/status")).content
        report = parse_report(page)
        assert (report.prompt_tokens, report.cached_tokens) == (prompt, cached)
        assert hit_rate_permille([report], None) == round(1000 * cached / prompt), "kubectl's column and explain's"
        # Dashboards: over a window that holds all requests a rate is the counter over its length, which cancels out.
        expressions = [query.expression for _, query in FLEET.expressions]
        rates = [RATE.fullmatch(expression) for expression in expressions if is_hit_rate(expression)]
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
        # `kvcluster metrics` reads routers and engines.
        (period,) = (await collect([management], workers=True, interval=None)).periods
        (engine,) = period.figures.engines
        assert (engine.worker, engine.url) == (cluster.local.workers[0].name, cluster.local.workers[0].url)
        for figures in (period.figures, period.figures.workers[0], engine):
            assert (figures.prompt_tokens, figures.cached_tokens, figures.hit_rate) == (prompt, cached, cached / prompt)
        first_tokens = next(each for each in engine.latencies if each.name == "time_to_first_token")
        assert first_tokens.count == engine.requests == period.figures.workers[0].requests
        # `kvcluster top` shows the router's live document.
        command = (sys.executable, "-m", "kvcluster", "top", management, "--once", "--json")
        ended = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        totals = orjson.loads((await ended.communicate())[0])["totals"]
        assert (totals["prompt_tokens"], totals["cached_tokens"]) == (prompt, cached)
        assert totals["hit_rate"] == pytest.approx(cached / prompt, abs=0.001)
        # What `kvcluster bench` says is what the router counted meanwhile.
        workload = build_workload(WorkloadSpec("rag", limit=40, rate=100))
        played = await measure(cluster.url, workload, LiveOptions(), Console(quiet=True))
        result = summarise(played.records, played.info)
        assert result.errors == 0
        after = parse_report((await cluster.client.get(f"{management}/status")).content)
        new_prompt, new_cached = after.prompt_tokens - prompt, after.cached_tokens - cached
        assert result.hit_rate == new_cached / new_prompt
        assert result.computed_tokens == new_prompt - new_cached
        assert sum(record.prompt_tokens or 0 for record in played.records) == new_prompt


async def test_counts_and_blocks_are_those_of_the_answers_and_the_caches(start_cluster: StartCluster) -> None:
    async with start_cluster(workers=2) as cluster:
        answers = await ask_all(cluster)
        assert (await cluster.client.get(f"{cluster.url}/v1/models")).status_code == 200  # a request without a decision
        await eventually(cluster.views_agree, "every view equals its worker's state")
        management = cluster.local.management_url

        async def shown(name: str, **labels: str) -> float:
            return await cluster.metric(management, f"kvcluster_router_{name}", **labels)

        reasons = Counter(answer.reason for answer in answers)
        assert len(reasons) > 1
        status = (await cluster.client.get(f"{management}/status")).json()
        assert {reason: count for reason, count in status["decisions"].items() if count} == reasons
        assert {reason: await shown("decisions_total", reason=reason) for reason in reasons} == reasons
        assert [each["worker_id"] for each in status["recent"]] == [answer.worker for answer in answers[:-21:-1]]
        assert await shown("requests_total", code="200") == len(answers) + 1
        assert await shown("ttft_seconds_count") == sum(answer.streamed for answer in answers)
        assert await shown("matched_blocks_count") == len(answers)
        assert await shown("matched_blocks_sum") == sum(answer.matched_blocks for answer in answers) > 0
        assert await shown("prompt_tokens_total") == sum(answer.usage["prompt_tokens"] for answer in answers)
        assert await shown("in_flight") == 0
        for name in ("request_seconds_count", "decision_seconds_count"):
            assert await shown(name) == len(answers)
        tokens = [answer.usage["completion_tokens"] for answer in answers if answer.streamed]
        assert await shown("tpot_seconds_count") == sum(count > 1 for count in tokens) > 0
        off = await shown("actual_cached_tokens_total") - await shown("predicted_cached_tokens_total")
        directions = {way: await shown("mispredicted_cached_tokens_total", direction=way) for way in ("under", "over")}
        assert off == directions["under"] - directions["over"]

        view = await observe(cluster.local, cluster.client)
        every: Counter[str] = Counter()
        for worker, drawn in zip(cluster.local.workers, view.workers, strict=True):
            its = [answer.usage for answer in answers if answer.worker == worker.name]
            assert its, "each worker has answered something"
            for name, field in (
                ("vllm:prompt_tokens_total", "prompt_tokens"),
                ("vllm:generation_tokens_total", "completion_tokens"),
            ):
                assert await cluster.metric(worker.url, name) == sum(usage[field] for usage in its)
            _, held = await cluster.worker_state(worker.url)
            assert await shown("worker_blocks", worker=worker.name) == held.total() == drawn.blocks
            assert await shown("worker_requests_total", worker=worker.name) == len(its)
            assert await shown("view_trust", worker=worker.name, trust="exact") == 1
            for name, of_engine in (("running", "running"), ("waiting", "waiting")):
                its_own = await cluster.metric(worker.url, f"vllm:num_requests_{of_engine}")
                assert await shown(f"worker_{name}", worker=worker.name) == its_own
            every |= held
        assert await shown("index_blocks") == len(every)
