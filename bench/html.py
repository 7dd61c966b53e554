"""The report of a comparison: one HTML file that loads nothing, for a reader who was not there.

Every text that comes from outside (names, commands, files) is escaped by the template engine; only the pictures, which
matplotlib draws and escapes, are markup of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.estimates import Estimate
from bench.experiment import Outcome
from bench.figures import BY_NAME, FIGURES, Figure
from bench.numbers import count, percent, rate, ratio, tokens
from bench.plot import inline_panels
from bench.report import highest_rate, ranked

if TYPE_CHECKING:
    from bench.comparison import Comparison

TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = {
    "rates": "Share of the requests that met the SLO at every rate that was tried.",
    "hit-rate": "Share of the prompt tokens that the workers found in their caches.",
    "ttft": "Time from sending a request to its first token.",
    "distribution": "Share of the requests whose first token had come after so long.",
    "load": "Prompt tokens that each worker had to compute, in the first run. Equal bars are even work.",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure in a table."""

    figure: str
    value: float | None
    """As it is in the JSON."""
    text: str
    best: bool = False
    telling: bool = True
    """Whether the interval of a difference leaves out 0."""


def _best(figure: Figure, outcomes: Sequence[Outcome]) -> float | None:
    means = [mean for outcome in outcomes if (mean := outcome.mean(figure.name)) is not None]
    if len(means) < 2 or min(means) == max(means):
        return None
    return max(means) if figure.better > 0 else min(means)


def _shown(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The figures that anybody has."""
    return [figure for figure in FIGURES if any(outcome.mean(figure.name) is not None for outcome in outcomes)]


def _row(outcome: Outcome, figures: Sequence[Figure], best: Mapping[str, float | None]) -> list[Cell]:
    found = [(figure, outcome.estimate(figure.name)) for figure in figures]
    return [
        Cell(
            figure.name,
            None if estimate is None else estimate.mean,
            figure.estimated(estimate),
            estimate is not None and estimate.mean == best[figure.name],
        )
        for figure, estimate in found
    ]


def _signed(figure: Figure, estimate: Estimate) -> str:
    shown = figure.estimated(estimate)
    return shown if estimate.mean < 0 else f"+{shown}"


def _differences(comparison: Comparison, figures: Sequence[Figure]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for name, contender in comparison.strategies.items():
        cells = []
        for figure in figures:
            found = contender.versus_winner.get(figure.name)
            telling = found is not None and found.low is not None and found.high is not None
            telling = telling and found is not None and not (found.low or 0.0) <= 0 <= (found.high or 0.0)
            shown = "-" if found is None else _signed(figure, found)
            cells.append(Cell(figure.name, None if found is None else found.mean, shown, telling=telling))
        if contender.versus_winner:
            rows.append((name, cells))
    return rows


def _probes(outcomes: Sequence[Outcome]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    searched = []
    for outcome in outcomes:
        if outcome.found is not None:
            rows = [
                {"rate": rate(p.rate), "met": p.met, "attainment": percent(p.attainment), "goodput": rate(p.goodput)}
                for p in outcome.found.probes
            ]
            searched.append((outcome.contender, highest_rate(outcome), rows))
    return searched


def _workers(outcomes: Sequence[Outcome]) -> list[tuple[str, list[list[str]]]]:
    """Per contender, what each worker did in the first run."""
    return [
        (
            outcome.contender,
            [
                [name, count(t.requests), tokens(t.prompt_tokens), tokens(t.uncached_tokens), tokens(t.output_tokens)]
                for name, t in outcome.results[0].workers.items()
            ],
        )
        for outcome in outcomes
    ]


def _pictures(outcomes: Sequence[Outcome], ceiling: float | None) -> list[tuple[str, Markup, str]]:
    """(name, SVG, caption) of each picture; empty without matplotlib."""
    try:
        drawn = inline_panels(outcomes, ceiling)
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        return []
    # Safe: matplotlib writes the file, and escapes the text in it.
    return [(name, Markup(svg), CAPTIONS[name]) for name, svg in drawn.items()]  # noqa: S704


def _text(value: object) -> str:
    if isinstance(value, str | int | float) or value is None:
        return str(value)
    return orjson.dumps(value).decode()


def render(outcomes: Sequence[Outcome], comparison: Comparison) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    order, figures = ranked(outcomes), _shown(outcomes)
    best = {figure.name: _best(figure, outcomes) for figure in figures}
    repeated = len(comparison.seeds) > 1
    key = [BY_NAME[name] for name in ("hit_rate", "ttft_p50_seconds", "ttft_p95_seconds", "tpot_p95_seconds")]
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        figures=figures,
        rows=[(outcome.contender, highest_rate(outcome), _row(outcome, figures, best)) for outcome in order],
        tiles=[(figure.heading, figure.estimated(order[0].estimate(figure.name))) for figure in key],
        ceiling=None if comparison.ceiling_hit_rate is None else percent(comparison.ceiling_hit_rate),
        searched=_probes(order),
        differences=_differences(comparison, figures) if repeated else [],
        pictures=_pictures(outcomes, comparison.ceiling_hit_rate),
        workers=_workers(order),
        errors=[
            (run.contender, run.seed, cause, number)
            for outcome in order
            for run in outcome.runs
            for cause, number in run.result.error_details.items()
        ],
        bottlenecks=[
            (run.contender, run.seed, "; ".join(run.result.loadgen.bottleneck))
            for outcome in order
            for run in outcome.runs
            if run.result.loadgen is not None and run.result.loadgen.bottleneck
        ],
        skews=[(outcome.contender, ratio(outcome.mean("prefill_skew"))) for outcome in order],
        config=[(name, _text(value)) for name, value in comparison.config.items()],
        versions=sorted(comparison.versions.items()),
        repeated=repeated,
    )


def write_report(file: Path, outcomes: Sequence[Outcome], comparison: Comparison) -> None:
    """Write the page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(outcomes, comparison), encoding="utf-8")
