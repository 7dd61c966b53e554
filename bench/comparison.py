"""What a comparison found, and the folder that it goes to: JSON, CSV, Markdown, pictures and a report."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bench.estimates import Estimate
from bench.experiment import Found, Outcome, Run
from bench.figures import BY_NAME, FIGURES
from bench.html import write_report
from bench.numbers import percent, seconds
from bench.plot import drawn, plot_comparison
from bench.record import Record, write_records
from bench.report import cells, columns, highest_rate, print_comparison, print_result, ranked, why
from bench.result import write_json

SUMMARY_FILE = "strategy_comparison_summary.json"
PLOT_FILE = "strategy_comparison.png"
VECTOR_FILE = "strategy_comparison.svg"
RUNS_FILE = "strategy_comparison.csv"
TABLE_FILE = "strategy_comparison.md"
REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where figures come from, as far as results do not say it: what it takes to repeat them."""

    command: str = ""
    """The command line, quoted for a shell."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts of the files that it names, by their paths: manifest and workload."""
    routers: Mapping[str, str] = field(default_factory=dict)
    """The commands of other routers, by name."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One contender of a comparison."""

    runs: Sequence[Mapping[str, Any]]
    """The figures of each run."""
    estimates: Mapping[str, Estimate | None]
    """Means over the runs, with confidence intervals, by the names of the figures."""
    versus_winner: Mapping[str, Estimate | None]
    """The same of this contender minus the winner, seed by seed; empty for the winner, and after a search."""
    search: Found | None
    """After a search for the highest rate: what it found."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All contenders side by side."""

    title: str
    winner: str
    why: str
    ceiling_hit_rate: float | None
    """The hit rate of one cache as large as those of all workers together; None: it was not computed."""
    strategies: Mapping[str, Contender]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seeds: Sequence[int]
    origin: Origin


def _figures(run: Run) -> dict[str, Any]:
    result = run.result
    return {
        "seed": run.seed,
        "rate": run.rate,
        "requests": result.requests,
        **{figure.name: figure.of(result) for figure in FIGURES},
        "error_causes": result.error_causes,
        "loadgen_bottleneck": result.loadgen.bottleneck if result.loadgen else (),
    }


def compared(outcomes: Sequence[Outcome], origin: Origin, ceiling: float | None = None) -> Comparison:
    """The comparison of these outcomes, of which there is at least one."""
    winner = ranked(outcomes)[0]
    first = outcomes[0].results[0]
    contenders = {
        outcome.contender: Contender(
            runs=[_figures(run) for run in outcome.runs],
            estimates={figure.name: outcome.estimate(figure.name) for figure in FIGURES},
            versus_winner={figure.name: outcome.versus(winner, figure.name) for figure in FIGURES}
            if outcome is not winner and outcome.found is None
            else {},
            search=outcome.found,
        )
        for outcome in outcomes
    }
    return Comparison(
        title=title_of(outcomes),
        winner=winner.contender,
        why=why(outcomes),
        ceiling_hit_rate=ceiling,
        strategies=contenders,
        config=first.config,
        versions=first.versions,
        seeds=[run.seed for run in outcomes[0].runs],
        origin=origin,
    )


def title_of(outcomes: Sequence[Outcome]) -> str:
    """What was run, and on how many workers."""
    first, runs = outcomes[0].results[0], len(outcomes[0].runs)
    how = "simulated" if first.config.get("mode") == "simulated" else f"speed {first.config.get('speed', 1):g}"
    times = f", {runs} times" if runs > 1 else ""
    return f"{first.config.get('workload')}: {first.requests:,} requests{times}, {len(first.workers)} workers ({how})"


def file_name(text: str) -> str:
    """A contender's name as part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "contender"


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the results of an experiment go, and the console that is told of them."""

    console: Console
    out: Path | None
    """None: nothing is written."""
    raw: Path | None = None
    """The records go to `runs_NAME.jsonl` beside `runs.jsonl`, one line for each request."""
    repeated: bool = False
    """Whether the names of files need the seed."""
    several: bool = True
    """Whether they need the name of the contender."""

    def keep(self, run: Run, records: Sequence[Record]) -> None:
        """Write the result of one run, and print a line about it."""
        result = run.result
        name = file_name(run.contender) + (f"_seed{run.seed}" if self.repeated else "")
        name += f"_{run.rate:.4g}rps" if run.rate is not None else ""
        if self.out is not None:
            write_json(self.out / f"results_{name}.json", result)
        if self.raw is not None:
            same = not (self.several or self.repeated or run.rate is not None)
            file = self.raw if same else self.raw.with_name(f"{self.raw.stem}_{name}{self.raw.suffix}")
            write_records(file, records)
        p50 = result.ttft_seconds.p50 if result.ttft_seconds else None
        at = f" at {run.rate:.4g}/s" if run.rate is not None else ""
        met = f", {percent(result.goodput.attainment)} within the SLO" if result.goodput is not None else ""
        self.console.print(
            Text(
                f"{run.contender}{at}{f', seed {run.seed}' if self.repeated else ''}: {result.requests:,} requests, "
                f"{result.errors:,} errors, hit rate {percent(result.hit_rate)}, TTFT p50 {seconds(p50)}{met}"
            )
        )

    def publish(self, outcomes: Sequence[Outcome], origin: Origin, ceiling: float | None = None) -> Comparison:
        """Print the comparison and write all its files."""
        comparison = compared(outcomes, origin, ceiling)
        if len(outcomes) == 1 and len(outcomes[0].runs) == 1 and ceiling is None:
            print_result(self.console, outcomes[0].results[0])
        if len(outcomes) > 1 or len(outcomes[0].runs) > 1 or ceiling is not None or outcomes[0].found is not None:
            print_comparison(self.console, outcomes, ceiling)
        if self.out is None:
            return comparison
        write_json(self.out / SUMMARY_FILE, comparison)
        write_runs(self.out / RUNS_FILE, outcomes)
        (self.out / TABLE_FILE).write_text(markdown(outcomes, comparison), encoding="utf-8")
        files = [SUMMARY_FILE, RUNS_FILE, TABLE_FILE]
        pictures = [PLOT_FILE, VECTOR_FILE]
        paths = [self.out / name for name in pictures]
        draw = partial(plot_comparison, paths, outcomes, comparison.title, comparison.ceiling_hit_rate)
        files += pictures if drawn(draw, self.console) else []
        write_report(self.out / REPORT_FILE, outcomes, comparison)
        self.console.print(
            Text(f"written to {self.out}: results_*.json, {', '.join(files)}; to read: {self.out / REPORT_FILE}")
        )
        return comparison


def write_runs(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write a row for each run, as CSV."""
    names = ["strategy", "seed", "rate", "requests", *(figure.name for figure in FIGURES)]
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.DictWriter(stream, names, extrasaction="ignore")
        rows.writeheader()
        for outcome in outcomes:
            rows.writerows({"strategy": outcome.contender, **_figures(run)} for run in outcome.runs)


def escaped(text: str) -> str:
    """Text that Markdown does not read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", text).replace("\n", " ")


def markdown(outcomes: Sequence[Outcome], comparison: Comparison) -> str:
    """The comparison as a Markdown table, with what it takes to repeat it."""
    names = columns(outcomes)
    searched = any(outcome.found is not None for outcome in outcomes)
    headings = ["strategy", *(["highest rate"] if searched else []), *(BY_NAME[name].heading for name in names)]
    lines = [f"# {escaped(comparison.title)}", "", escaped(comparison.why), ""]
    lines += [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    for outcome in ranked(outcomes):
        row = [escaped(outcome.contender), *([highest_rate(outcome)] if searched else []), *cells(outcome, names)]
        lines.append(f"| {' | '.join(row)} |")
    if comparison.ceiling_hit_rate is not None:
        at = headings.index("hit rate")
        row = ["one pooled cache", *[""] * (at - 1), percent(comparison.ceiling_hit_rate)]
        lines.append(f"| {' | '.join(row + [''] * (len(headings) - len(row)))} |")
    lines += ["", f"Seeds: {', '.join(map(str, comparison.seeds))}."]
    if len(comparison.seeds) > 1:
        lines.append("± is half the width of the 95 % confidence interval over the seeds (Student's t).")
    if comparison.origin.command:
        lines += ["", f"    {comparison.origin.command}"]
    return "\n".join(lines) + "\n"
