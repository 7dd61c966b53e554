"""What is written of a comparison: that every file has the same figures, which are sums over the raw records, and that
text of others stays text.

Not covered: how the pictures look.
"""

from __future__ import annotations

import asyncio
import csv
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from rich.console import Console

from bench.comparison import Folder, Origin, markdown
from bench.estimates import estimate
from bench.experiment import ExperimentOptions, Outcome, Played, conduct
from bench.rate_search import SearchOptions
from bench.record import ErrorCause, Record, read_records
from bench.result import Measurement, RunInfo, WarmUp
from bench.slo import Slo
from bench.workloads import WorkloadSpec

HOSTILE = "<script>alert('x')</script> [red]$a$ {{ 7 * 7 }} `b` | c"


def records(contender: str, seed: int, rate: float) -> list[Record]:
    random = Random(f"{contender} {seed}")
    found = []
    for index in range(30):
        at = index / rate
        first = at + random.uniform(0.05, 0.2) * (1 if contender == "cache_aware" else 2)
        error = ErrorCause.TIMEOUT if random.random() < 0.05 else None
        detail = "too <late>" if error else ""
        cached = random.randrange(100)
        tokens = random.randint(2, 20)
        worker = random.choice("ab")
        found.append(
            Record(index, at, at, first, first + tokens / 50, worker, "", 0, 100, cached, tokens, error, detail)
        )
    return found


async def play(contender: str, spec: WorkloadSpec) -> Played:
    config = {"workload": HOSTILE, "mode": "live", "speed": 1.0, "model": None}
    info = RunInfo(contender, spec.seed, config, worker_ids=("a", "b"))
    return Played(records(contender, spec.seed, spec.rate or 5.0), info)


def published(
    out: Path, names: Sequence[str], repeats: int, search: SearchOptions | None = None
) -> tuple[list[Outcome], str]:
    measurement = Measurement(WarmUp(requests=5), Slo(ttft=0.25, tpot=0.1))
    options = ExperimentOptions(WorkloadSpec("uniform"), measurement, repeats, search)
    console = Console(record=True, width=200, quiet=False, file=sys.stderr)
    folder = Folder(console, out, out / "raw.jsonl", repeated=repeats > 1)
    outcomes = asyncio.run(conduct(play, names, options, folder.keep))
    origin = Origin(f"kvcluster compare {HOSTILE}", {"manifest": HOSTILE}, {names[-1]: HOSTILE})
    folder.publish(outcomes, origin, 0.7)
    return outcomes, console.export_text()


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed: drawing takes seconds."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class Cells(HTMLParser):
    """The `data-value` of the cells of a table by contender and figure, and every tag and address of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.values: dict[tuple[str, str, str], float | None] = {}
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self._table = self._contender = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "table":
            self._table = found.get("id") or ""
        if tag == "tr":
            self._contender = found.get("data-contender") or ""
        if tag == "td" and found.get("data-figure"):
            value = found["data-value"]
            key = (self._table, self._contender, str(found["data-figure"]))
            self.values[key] = float(value) if value else None


def independent(rows: Sequence[Record]) -> dict[str, float]:
    """Some figures of a run, summed without the code that is tested."""
    measured = [row for row in rows if row.index >= 5]
    answered = [row for row in measured if not row.error]
    in_time = [
        row
        for row in answered
        if row.first_token is not None
        and row.finished is not None
        and row.output_tokens is not None
        and row.first_token - row.sent <= 0.25
        and (row.finished - row.first_token) / (row.output_tokens - 1) <= 0.1
    ]
    ends = max(row.finished or 0.0 for row in measured)
    return {
        "hit_rate": sum(row.cached_tokens or 0 for row in answered) / sum(row.prompt_tokens or 0 for row in answered),
        "computed_tokens": sum(100 - (row.cached_tokens or 0) for row in answered),
        "errors": len(measured) - len(answered),
        "attainment": len(in_time) / len(measured),
        "goodput": len(in_time) / (ends - min(row.scheduled for row in measured)),
    }


@pytest.mark.usefixtures("without_pictures")
def test_every_file_has_the_figures_that_the_raw_records_give(tmp_path: Path) -> None:
    names = ["cache_aware", "round_robin"]
    published(tmp_path, names, repeats=3)
    summed = orjson.loads((tmp_path / "strategy_comparison_summary.json").read_bytes())
    page = Cells((tmp_path / "report.html").read_text())
    with (tmp_path / "strategy_comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in names:
        runs = [independent(read_records(tmp_path / f"raw_{name}_seed{seed}.jsonl")) for seed in range(3)]
        contender = summed["strategies"][name]
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            assert [run[figure] for run in contender["runs"]] == pytest.approx(values)
            assert [float(row[figure]) for row in rows if row["strategy"] == name] == pytest.approx(values)
            expected = estimate(values)
            assert expected is not None
            written = contender["estimates"][figure]
            assert (written["mean"], written["low"]) == (pytest.approx(expected.mean), pytest.approx(expected.low))
            assert page.values["figures", name, figure] == pytest.approx(expected.mean)
        for figure, written in contender["estimates"].items():
            if ("figures", name, figure) in page.values:
                assert page.values["figures", name, figure] == (written and written["mean"])
    (loser,) = (name for name in names if name != summed["winner"])
    for figure, written in summed["strategies"][loser]["versus_winner"].items():
        if ("differences", loser, figure) in page.values:
            assert page.values["differences", loser, figure] == (written and written["mean"])
    assert summed["seeds"] == [0, 1, 2]


@pytest.mark.simulation  # it draws, which takes seconds
def test_a_report_loads_nothing_and_shows_text_of_others_as_text(tmp_path: Path) -> None:
    search = SearchOptions(Slo(ttft=0.25), attainment=0.5, tolerance=0.5)
    _, said = published(tmp_path, ["cache_aware", HOSTILE], 1, search)
    page = (tmp_path / "report.html").read_text()
    cells = Cells(page)
    assert page.count("<svg") == 5
    assert (tmp_path / "strategy_comparison.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "strategy_comparison.svg").getroot().tag.endswith("svg")  # noqa: S314 - our own file
    assert not cells.tags & {"script", "img", "link", "iframe", "object", "image"}
    assert all(address.startswith("#") for address in cells.addresses), cells.addresses
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    assert "default-src 'none'" in page
    assert HOSTILE in said, "Rich's markup is text, too"
    assert "<script" not in (tmp_path / "strategy_comparison.svg").read_text()
    assert "results_script-alert-x-script-red-a-7-7-b-c_12rps.json" in {file.name for file in tmp_path.iterdir()}
    table = (tmp_path / "strategy_comparison.md").read_text().splitlines()
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table if line.startswith("|")}
    assert len(widths) == 1, "no name opens a cell of its own"


@pytest.mark.usefixtures("without_pictures")
def test_a_search_is_reported_with_every_rate_that_it_tried(tmp_path: Path) -> None:
    search = SearchOptions(Slo(ttft=0.25), attainment=0.5, tolerance=0.5)
    outcomes, said = published(tmp_path, ["cache_aware", "round_robin"], 1, search)
    summed = orjson.loads((tmp_path / "strategy_comparison_summary.json").read_bytes())
    page = (tmp_path / "report.html").read_text()
    assert "Rates that were tried" in page
    for outcome in outcomes:
        assert outcome.found is not None
        written = summed["strategies"][outcome.contender]["search"]
        assert [probe["rate"] for probe in written["probes"]] == [probe.rate for probe in outcome.found.probes]
        assert written["bracket"]["passed"] == outcome.found.bracket.passed
    assert "highest rate" in said


@pytest.mark.usefixtures("without_pictures")
def test_without_matplotlib_only_the_pictures_are_missing(tmp_path: Path) -> None:
    _, said = published(tmp_path, ["cache_aware", "custom"], repeats=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "raw_cache_aware.jsonl",
        "raw_custom.jsonl",
        "report.html",
        "results_cache_aware.json",
        "results_custom.json",
        "strategy_comparison.csv",
        "strategy_comparison.md",
        "strategy_comparison_summary.json",
    ]
    summed = orjson.loads((tmp_path / "strategy_comparison_summary.json").read_bytes())
    assert (summed["winner"], summed["ceiling_hit_rate"]) == ("cache_aware", 0.7)
    assert "cache_aware starts answering soonest" in said
    assert "<svg" not in (tmp_path / "report.html").read_text()
    assert "no picture: matplotlib is not installed (pip install 'kvcluster[plot]')" in said


@pytest.mark.usefixtures("without_pictures")
def test_a_markdown_table_has_a_row_for_each_contender_and_the_ceiling(tmp_path: Path) -> None:
    published(tmp_path, ["cache_aware", "custom"], repeats=2)
    text = (tmp_path / "strategy_comparison.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "strategy", "---", "cache\\_aware", "custom", "one pooled cache",
    ]  # fmt: skip
    assert "±" in rows[2]
    assert "Seeds: 0, 1." in text


def test_a_report_without_figures_can_be_written() -> None:
    """Nothing was answered: there is nothing to estimate, draw or rank by."""
    from bench.comparison import compared
    from bench.experiment import Run
    from bench.html import render
    from bench.result import summarise

    info = RunInfo("x", 0, {"workload": "w", "mode": "simulated"})
    result = summarise([Record(0, 0, 0, error=ErrorCause.TIMEOUT, detail="late")], info)
    outcomes = [Outcome(name, [Run(name, 0, None, result)]) for name in ("x", "y")]
    comparison: Any = compared(outcomes, Origin())
    assert "No strategy answered a request." in render(outcomes, comparison)
    assert "No strategy" in markdown(outcomes, comparison)
