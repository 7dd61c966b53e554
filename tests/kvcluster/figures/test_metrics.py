"""`kvcluster metrics`: its figures equal sums over what the clients were answered.

Covered: two routers before the same workers on a clock that the test moves, since the start and for a window; JSON, CSV
and the table; hostile names; routers and workers that cannot be read. Not covered: engines' own metrics
(tests/e2e/test_figures.py), how histograms are read and added (test_exposition.py).
"""

from __future__ import annotations

import collections
import csv
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from rich.console import Console

from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.metrics import collect, metrics
from kvcluster.figures.exposition import parse
from kvcluster.figures.figures import Figures, figures
from kvcluster.figures.render import Period, Report, as_csv, as_json, rendered
from kvcluster.figures.scrape import ScrapeError, scrape
from tests.router.conftest import MovedClock, RunningRouter, router_starter, until
from tests.router.fakes import DONE, Connection, FakeWorker, Received, fake_workers, token

NO_TIMEOUTS = dict.fromkeys(("liveness_timeout", "answer_timeout", "idle_timeout", "stall_timeout", "cut_timeout"), 1e6)


@dataclass
class Traffic:
    """Two routers, the workers behind them, and what clients were told."""

    routers: list[RunningRouter]
    workers: list[FakeWorker]
    clock: MovedClock
    answers: list[httpx.Response] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [str(router.management.base_url) for router in self.routers]

    async def send(self, asked: list[tuple[int, list[int], float, int]]) -> None:
        """(router, prompt, seconds to the first token, cached tokens that the answer reports) of each request."""
        for router, prompt, wait, cached in asked:
            fields = {"wait": wait, "cached": cached, "stream": True}
            self.answers.append(await self.routers[router].complete(prompt, **fields))
            self.waits.append(wait)
        await until(lambda: all(router.nothing_held() for router in self.routers))


@pytest.fixture
async def traffic() -> AsyncIterator[Traffic]:
    clock, start, tokenizer = MovedClock(), router_starter(load_tokenizer("gpt2")), load_tokenizer("gpt2")

    async def script(connection: Connection, request: Received) -> None:
        if request.method == "GET":
            await connection.answer(404, b"{}")
            return
        fields = orjson.loads(request.body)
        clock.now += fields["wait"]
        prompt, details = len(fields["prompt"]), {"cached_tokens": fields["cached"]}
        usage = {"prompt_tokens": prompt, "completion_tokens": 2, "prompt_tokens_details": details}
        last = b"data: " + orjson.dumps({"id": "cmpl-1", "choices": [], "usage": usage}) + b"\n\n"
        await connection.begin_stream()
        for event in (token("a"), token("b", "stop"), last, DONE):
            await connection.chunk(event)
        await connection.end_stream()

    chosen: dict[str, Any] = {"clock": clock, "routing_strategy": "cache_aware", **NO_TIMEOUTS}
    async with fake_workers(script, script, script) as workers:
        for number, worker in enumerate(workers):
            worker.serve_feed(tokenizer.fingerprint, f"w{number}")
        async with start(workers, **chosen) as first, start(workers, **chosen) as second:
            await until(lambda: all(len(worker.feeds) == 2 for worker in workers))
            yield Traffic([first, second], workers, clock)


DOCUMENT = list(range(16 * 20))
FIRST = [
    (0, DOCUMENT, 0.5, 0), (0, [*DOCUMENT, 1, 2], 0.0625, 320), (1, [5] * 40, 0.25, 0), (1, DOCUMENT[:100], 0.0, 96),
]  # fmt: skip
LATER = [(0, [*DOCUMENT[:64], *[3] * 200], 2.0, 64), (1, [5] * 300, 4.0, 32), (0, [*DOCUMENT, 3], 0.03125, 320)]


def expected(traffic: Traffic, since: int = 0) -> dict[str, Any]:
    """What the figures must be, from nothing but prompts and answers."""
    answers, waits = traffic.answers[since:], traffic.waits[since:]
    usages = [
        orjson.loads(line[6:])["usage"]
        for answer in answers
        for line in answer.content.splitlines()
        if line.startswith(b"data: {") and b'"usage"' in line
    ]
    matched = [int(answer.headers["x-kvcluster-matched-blocks"]) for answer in answers]
    blocks = [-(-usage["prompt_tokens"] // 16) for usage in usages]
    use = ["hit" if 2 * m >= b else "partial" if m else "miss" for m, b in zip(matched, blocks, strict=True)]
    prompt, cached = ([value(usage) for usage in usages] for value in (prompt_of, cached_of))
    errors = [16 * m - c for m, c in zip(matched, cached, strict=True)]
    off = {"over": sum(max(e, 0) for e in errors), "under": sum(max(-e, 0) for e in errors)}
    return {
        "requests": {"200": len(answers)},
        "decisions": dict(collections.Counter(answer.headers["x-kvcluster-reason"] for answer in answers)),
        "prompt_tokens": sum(prompt),
        "cached_tokens": sum(cached),
        "hit_rate": sum(cached) / sum(prompt),
        "predicted_cached_tokens": 16 * sum(matched),
        "mispredicted_cached_tokens": {name: tokens for name, tokens in off.items() if tokens},
        "times": {
            each: (len(own), sum(own) / len(own))
            for each in {"", *use}
            if (own := [wait for wait, its in zip(waits, use, strict=True) if each in ("", its)])
        },
        "matched": (len(matched), sum(matched) / len(matched)),
        "workers": {
            name: (len(rows), sum(prompt[row] for row in rows), sum(cached[row] for row in rows))
            for name in ("w0", "w1", "w2")
            for rows in [[row for row, a in enumerate(answers) if a.headers["x-kvcluster-worker"] == name]]
        },
    }


def prompt_of(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens"])


def cached_of(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def told(found: Figures) -> dict[str, Any]:
    plain = ("requests", "decisions", "prompt_tokens", "cached_tokens", "hit_rate", "predicted_cached_tokens")
    assert found.matched_blocks is not None
    assert sum(bucket.requests for bucket in found.match_lengths) == found.matched_blocks.count
    return {
        **{name: getattr(found, name) for name in (*plain, "mispredicted_cached_tokens")},
        "times": {
            each.labels.get("cache", ""): (each.count, each.mean)
            for each in found.latencies
            if each.name == "ttft" and each.count
        },
        "matched": (found.matched_blocks.count, found.matched_blocks.mean),
        "workers": {row.worker: (row.requests, row.prompt_tokens, row.cached_tokens) for row in found.workers},
    }


async def test_figures_of_two_routers_are_sums_over_their_answers(traffic: Traffic) -> None:
    await traffic.send(FIRST)
    (period,) = (await collect(traffic.urls, workers=False, interval=None)).periods
    assert told(period.figures) == expected(traffic)
    assert expected(traffic)["times"].keys() == {"", "hit", "miss"}

    async def while_it_waits(seconds: float) -> None:
        assert seconds == 10.0
        await traffic.send(LATER)

    named_twice = [*traffic.urls, f"{traffic.urls[0]}/metrics"]
    report = await collect(named_twice, workers=False, interval=10.0, sleep=while_it_waits)
    whole, last = report.periods
    assert told(whole.figures) == expected(traffic)
    assert told(last.figures) == expected(traffic, since=len(FIRST))
    assert expected(traffic)["times"].keys() == {"", "hit", "partial", "miss"}


async def test_every_form_has_the_same_figures(traffic: Traffic) -> None:
    await traffic.send([*FIRST, *LATER])
    report = await collect(traffic.urls, workers=False, interval=None)
    figures_of, sums = report.periods[0].figures, expected(traffic)
    document = json.loads(as_json(report))
    assert document["routers"] == traffic.urls
    assert document["periods"][0]["figures"]["hit_rate"] == sums["hit_rate"]
    assert [row["worker"] for row in document["periods"][0]["figures"]["workers"]] == ["w0", "w1", "w2"]
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    found = {(row["group"], row["name"], row["labels"], row["figure"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    assert float(found["cache", "", "", "hit_rate"]) == sums["hit_rate"]
    assert int(found["requests", "200", "", "requests"]) == len(traffic.answers)
    hits = sums["times"]["hit"]
    assert float(found["latency_seconds", "ttft", "cache=hit", "mean"]) == hits[1]
    for name, own in sums["workers"].items():
        assert int(found["worker", name, "", "requests"]) == own[0]
    matched = [int(row["value"]) for row in rows if row["group"] == "matched_blocks" and row["figure"] == "requests"]
    assert sum(matched) == len(traffic.answers)
    shown = drawn(report)
    assert f"{sums['hit_rate']:.1%} ({sums['cached_tokens']:,} of {sums['prompt_tokens']:,} prompt tokens)" in shown
    assert re.search(rf"cache: hit +{hits[0]} +{1000 * hits[1]:,.1f} ms", shown)
    assert "interpolated" in shown
    for bucket in figures_of.match_lengths:
        assert f"{bucket.requests / len(traffic.answers):.1%}" in shown


def drawn(report: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(rendered(report), highlight=False)
    return out.getvalue()


def test_hostile_names_are_text() -> None:
    name = "=[red]cmd\x1b[31m\u202e,x"
    registry = CollectorRegistry()
    Counter("kvcluster_router_worker_requests", "x", ["worker"], registry=registry).labels(name).inc(3)
    page = parse(generate_latest(registry).decode())
    report = Report(("r",), (Period("since_start", None, figures([page])),))
    assert "=[red]cmd\\x1b[31m\\u202e,x" in drawn(report)
    (row,) = [row for row in csv.reader(io.StringIO(as_csv(report))) if row[4] == "requests"]
    assert row[2] == "'=[red]cmd\\x1b[31m\\u202e,x"
    assert json.loads(as_json(report))["periods"][0]["figures"]["workers"][0]["worker"] == name


def test_parts_of_a_time_are_not_added_to_one_distribution() -> None:
    registry = CollectorRegistry()
    phases = Histogram("kvcluster_router_decision_phase_seconds", "x", ["phase"], registry=registry)
    for phase, seconds in (("read", 0.001), ("choose", 0.002), ("choose", 0.004)):
        phases.labels(phase).observe(seconds)
    found = figures([parse(generate_latest(registry).decode())])
    assert [(each.labels, each.count) for each in found.latencies] == [({"phase": "choose"}, 2), ({"phase": "read"}, 1)]
    lines = drawn(Report(("r",), (Period("since_start", None, found),))).splitlines()
    assert [line.split()[:4] for line in lines if "phase:" in line] == [
        ["decision", "phase", "phase:", "choose"],
        ["phase:", "read", "1", "1.0"],
    ]


def test_a_router_without_requests_has_no_rates() -> None:
    found = figures([parse("")])
    assert (found.hit_rate, found.matched_blocks, found.requests, found.workers) == (None, None, {}, ())
    assert "hit rate   -" in drawn(Report(("r",), (Period("since_start", None, found),)))


async def test_a_worker_that_cannot_be_read_is_named_and_left_out(traffic: Traffic) -> None:
    report = await collect(traffic.urls[:1], workers=True, interval=None)
    assert report.periods[0].figures.engines == ()
    assert len(report.unread) == len(traffic.workers)
    said = [f"{worker.url}/metrics answered 404: is this the URL of a management port?" for worker in traffic.workers]
    assert sorted(report.unread) == sorted(said)


async def test_a_router_that_cannot_be_read_is_an_error(traffic: Traffic) -> None:
    data = f"http://127.0.0.1:{traffic.routers[0].data.port}"
    with pytest.raises(ScrapeError, match="is this the URL of a management port"):
        await collect([data], workers=False, interval=None)
    foreign = answering(b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n")
    with pytest.raises(ScrapeError, match="has no metrics of a router"):
        async with httpx.AsyncClient(transport=foreign) as client:
            await scrape(client, ["http://worker:8100"], workers=False)
    with pytest.raises(ScrapeError, match="/metrics: no metrics in Prometheus's format"):
        await collect([f"{traffic.urls[0]}/health#"], workers=False, interval=None)


def answering(page: bytes) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(200, content=page))


@pytest.mark.parametrize(
    ("form", "url", "code", "message"),
    [
        ("xml", "http://127.0.0.1:1", 2, "--format is one of table, json, csv, not 'xml'"),
        ("table", "http://127.0.0.1:1", 1, "http://127.0.0.1:1/metrics cannot be read: "),
        ("table", "http://[", 1, "http://[/metrics cannot be read: "),
    ],
    ids=["form", "nobody there", "no URL"],
)
def test_exit_codes(form: str, url: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics([url], workers=False, interval=None, form=form) == code
    assert message in capsys.readouterr().err
