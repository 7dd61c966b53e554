"""The pictures of a comparison: panels with one colour for each contender, as one picture or each on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from bench.experiment import Outcome
from bench.numbers import percent, seconds, tokens

COLOURS: Mapping[str, str] = {
    "cache_aware": "#0072b2",
    "round_robin": "#e69f00",
    "least_loaded": "#009e73",
    "longest_prefix": "#cc79a7",
}
"""The palette of Okabe and Ito, whose colours can be told apart with every kind of colour vision."""
OTHER_COLOURS = ("#d55e00", "#56b4e9", "#f0e442", "#555555")
INK = "#222222"
FAINT = "#dddddd"
PAPER = "#ffffff"
EDGE = "#888888"
MOST_LABELLED = 4
"""Contenders up to which every bar has its figure written on it."""


def _colour(outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
    others = [each.contender for each in outcomes if each.contender not in COLOURS]
    if outcome.contender in COLOURS:
        return COLOURS[outcome.contender]
    return OTHER_COLOURS[others.index(outcome.contender) % len(OTHER_COLOURS)]


def plain(text: str) -> str:
    """A name as it is: matplotlib reads what stands between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value else "0"


def _label(outcome: Outcome) -> str:
    name = outcome.contender
    return plain(name if len(name) <= 20 else f"{name[:19]}…").replace("_", "\n")


def _margins(outcomes: Sequence[Outcome], figure: str) -> list[float]:
    """Half the widths of the confidence intervals; 0 where there is none."""
    estimates = [outcome.estimate(figure) for outcome in outcomes]
    return [0.0 if each is None or each.margin is None else each.margin for each in estimates]


def _whiskers(axes: Any, at: Sequence[float], values: Sequence[float], margins: Sequence[float]) -> None:
    if any(margins):
        axes.errorbar(at, values, yerr=margins, fmt="none", ecolor=INK, elinewidth=1, capsize=2)


def _hit_rates(axes: Any, outcomes: Sequence[Outcome], ceiling: float | None) -> None:
    rates = [outcome.mean("hit_rate") or 0.0 for outcome in outcomes]
    places = range(len(outcomes))
    margins = _margins(outcomes, "hit_rate")
    axes.bar(places, rates, color=[_colour(each, outcomes) for each in outcomes], width=0.6)
    _whiskers(axes, list(places), rates, margins)
    axes.set_xticks(places, [_label(each) for each in outcomes])
    for place, outcome in zip(places, outcomes, strict=True):
        axes.annotate(
            percent(outcome.mean("hit_rate")),
            (place, rates[place] + margins[place]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=INK,
            zorder=3,
            # On paper: otherwise the dashed line would cross the label of a bar that reaches the ceiling.
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
    top = max([*(sum(pair) for pair in zip(rates, margins, strict=True)), ceiling or 0.0, 0.01])
    if ceiling is not None:
        axes.axhline(ceiling, color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(0, top * 1.18)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    pooled = "more is better" if ceiling is None else f"dashed: one pooled cache, {percent(ceiling)}"
    axes.set_title(f"Prompt tokens found in cache ({pooled})")


TTFTS = ("ttft_p50_seconds", "ttft_p95_seconds", "ttft_p99_seconds")


def _ttfts(axes: Any, outcomes: Sequence[Outcome]) -> None:
    width = 0.8 / len(outcomes)
    heights = [value for each in outcomes for name in TTFTS if (value := each.mean(name))]
    spread = bool(heights) and max(heights) > 20 * min(heights)
    for place, outcome in enumerate(outcomes):
        values = [outcome.mean(name) or 0.0 for name in TTFTS]
        margins = [_margins([outcome], name)[0] for name in TTFTS]
        at = [group + (place - (len(outcomes) - 1) / 2) * width for group in range(3)]
        bars = axes.bar(at, values, width * 0.92, color=_colour(outcome, outcomes), label=plain(outcome.contender))
        _whiskers(axes, at, values, margins)
        if len(outcomes) <= MOST_LABELLED and not any(margins):
            axes.bar_label(bars, [seconds(value) for value in values], padding=2, fontsize=6.5, color=INK, rotation=45)
    axes.set_xticks(range(3), ["p50", "p95", "p99"])
    if spread:
        axes.set_yscale("log")
        axes.set_ylim(min(heights) * 0.6, max(heights) * 3)
    elif heights:
        axes.set_ylim(0, max(heights) * 1.3)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    axes.yaxis.set_major_formatter(_tick)
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Time to first token (less is better" + (", logarithmic)" if spread else ")"))


CROWDED = 100
"""Largest over smallest time above which labels at 1, 2 and 5 of each decade would overlap."""


def percentiles(outcome: Outcome) -> list[float]:
    """TTFT at 0 %, 1 %, ... 100 %, each the mean over the runs; empty without answers."""
    runs = [result.ttft_percentiles for result in outcome.results if result.ttft_percentiles]
    return [fmean(values) for values in zip(*runs, strict=True)]


def _distribution(axes: Any, outcomes: Sequence[Outcome]) -> None:
    from matplotlib.ticker import LogLocator  # see styled

    lows, highs = [], []
    for outcome in outcomes:
        values = percentiles(outcome)
        if not values:
            continue
        colour = _colour(outcome, outcomes)
        axes.plot(values, range(101), color=colour, label=plain(outcome.contender), linewidth=1.8)
        lows.append(max(values[1], 1e-4))
        highs.append(values[-1])
    if lows:
        axes.set_xscale("log")
        axes.set_xlim(min(lows) * 0.8, max(highs) * 1.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(highs) < CROWDED * min(lows) else (1,)))
        axes.legend(frameon=False, fontsize=8, loc="best")
    axes.xaxis.set_major_formatter(_tick)
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_ylim(0, 101)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.set_xlabel("time to first token")
    axes.set_title("Requests answering within (left is better)")


def _loads(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """The uncached tokens of each worker in the first run, the busiest first: a flat row is even work, a low one is
    little work."""
    labels = []
    for place, outcome in enumerate(outcomes):
        first = outcome.results[0]
        computed = sorted((tally.uncached_tokens for tally in first.workers.values()), reverse=True)
        width = 0.84 / max(1, len(computed))
        at = [place - 0.42 + width * (rank + 0.5) for rank in range(len(computed))]
        axes.bar(at, computed, width * 0.9, color=_colour(outcome, outcomes))
        mean = sum(computed) / len(computed) if computed else 0.0
        axes.hlines(mean, place - 0.44, place + 0.44, color=INK, linestyle="--", linewidth=1)
        skew = "-" if first.prefill_skew is None else f"{first.prefill_skew:.2f}"
        labels.append(f"{_label(outcome)}\n{skew}")
    axes.set_xticks(range(len(outcomes)), labels)
    axes.yaxis.set_major_formatter(lambda value, _: tokens(value))
    axes.set_title("Prompt tokens computed by each worker (dashed: mean; below: max/mean)")


def _rates(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """The share of the requests that met the SLO at every rate that a search tried."""
    for outcome in outcomes:
        if outcome.found is None:
            continue
        colour, probes = _colour(outcome, outcomes), outcome.found.probes
        shares = [100 * probe.attainment for probe in probes]
        label = plain(outcome.contender)
        axes.plot([p.rate for p in probes], shares, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(100 * outcome.found.options.attainment, color=INK, linestyle="--", linewidth=1)
        if outcome.found.bracket.passed is not None:
            axes.axvline(outcome.found.bracket.passed, color=colour, linestyle=":", linewidth=1)
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.set_xlabel("requests a second")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.set_title("Requests within the SLO at each rate (dotted: the highest that met it)")


Draw = Callable[[Any], None]


def _panels(outcomes: Sequence[Outcome], ceiling: float | None) -> dict[str, Draw]:
    """What to draw, by the names of the panels."""
    drawn: dict[str, Draw] = {
        "hit-rate": lambda axes: _hit_rates(axes, outcomes, ceiling),
        "ttft": lambda axes: _ttfts(axes, outcomes),
        "distribution": lambda axes: _distribution(axes, outcomes),
        "load": lambda axes: _loads(axes, outcomes),
    }
    if any(outcome.found is not None for outcome in outcomes):
        drawn = {"rates": lambda axes: _rates(axes, outcomes), **drawn}
    return drawn


@contextmanager
def styled(**more: object) -> Iterator[type[Any]]:
    """The style of the pictures, and matplotlib's `Figure`. Raises `ModuleNotFoundError` without matplotlib."""
    # Imported here: matplotlib takes most of a second to import, and only the end of a comparison needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": EDGE,
        "axes.labelcolor": INK,
        "xtick.color": EDGE,
        "ytick.color": EDGE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "axes.grid": True,
        "grid.color": FAINT,
        "axes.axisbelow": True,
        "svg.fonttype": "none",
        **more,
    }
    with mpl.rc_context(style):
        yield Figure


def _draw(axes: Any, name: str, draw: Draw) -> None:
    draw(axes)
    if name not in ("distribution", "rates"):
        axes.grid(False, axis="x")


def plot_comparison(
    files: Sequence[Path], outcomes: Sequence[Outcome], title: str, ceiling: float | None = None
) -> None:
    """Write the picture to each file, in the format of its ending. `ceiling` is the hit rate of one cache as large as
    those of all workers together. Raises `ModuleNotFoundError` without matplotlib."""
    panels = _panels(outcomes, ceiling)
    rows = -(-len(panels) // 2)
    with styled(**{"svg.hashsalt": title}) as figure_type:
        figure = figure_type(figsize=(12, 4.2 * rows), layout="constrained")
        grid = figure.subplots(rows, 2).flat
        for axes, (name, draw) in zip(grid, panels.items(), strict=False):
            _draw(axes, name, draw)
        for axes in grid:  # those that are left
            axes.set_axis_off()
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # it would lay the figure out anew for each file
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)


def inline_panels(outcomes: Sequence[Outcome], ceiling: float | None = None) -> dict[str, str]:
    """Each panel as SVG to stand in an HTML page, in the page's colours: `currentColor`, and the variables `--grid`,
    `--edge` and `--paper`. Raises `ModuleNotFoundError` without matplotlib."""
    drawn = {}
    for name, draw in _panels(outcomes, ceiling).items():
        # Salted by the name: ids must differ between the pictures of a page.
        with styled(**{"svg.hashsalt": name}) as figure_type:
            figure = figure_type(figsize=(6, 3.9), layout="constrained", facecolor="none")
            axes = figure.subplots()
            axes.set_facecolor("none")
            _draw(axes, name, draw)
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        for colour, variable in ((INK, "currentColor"), (FAINT, "var(--grid)"), (EDGE, "var(--edge)")):
            svg = svg.replace(colour, variable)
        drawn[name] = svg[svg.index("<svg") :].replace(PAPER, "var(--paper)")
    return drawn


def drawn(draw: Callable[[], None], console: Console) -> bool:
    """Draw a picture, if the extra `plot` is installed. Returns whether it is."""
    try:
        draw()
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        console.print("no picture: matplotlib is not installed (pip install 'kvcluster[plot]')", markup=False)
        return False
    return True
