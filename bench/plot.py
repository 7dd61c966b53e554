"""The picture of a comparison: four panels, with one colour for each strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import percent, seconds, three, tokens
from bench.result import Result

COLOURS: Mapping[str, str] = {
    "cache_aware": "#0072b2",
    "round_robin": "#e69f00",
    "least_loaded": "#009e73",
    "longest_prefix": "#cc79a7",
}
"""The palette of Okabe and Ito, whose colours can be told apart with every kind of colour vision."""
OTHER_COLOURS = ("#56b4e9", "#d55e00", "#f0e442", "#555555")
INK = "#222222"
FAINT = "#dddddd"


def _colour(result: Result, results: Sequence[Result]) -> str:
    others = [r.strategy for r in results if r.strategy not in COLOURS]
    if result.strategy in COLOURS:
        return COLOURS[result.strategy]
    return OTHER_COLOURS[others.index(result.strategy) % len(OTHER_COLOURS)]


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value else "0"


def _label(result: Result) -> str:
    return result.strategy.replace("_", "\n")


def _hit_rates(axes: Any, results: Sequence[Result], ceiling: float | None) -> None:
    rates = [r.hit_rate or 0.0 for r in results]
    bars = axes.bar([_label(r) for r in results], rates, color=[_colour(r, results) for r in results], width=0.6)
    # On white: otherwise the dashed line would cross the label of a bar that reaches the ceiling.
    axes.bar_label(
        bars,
        [percent(r.hit_rate) for r in results],
        padding=3,
        color=INK,
        zorder=3,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    top = max([*rates, ceiling or 0.0, 0.01])
    if ceiling is not None:
        axes.axhline(ceiling, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            f"one pooled cache: {percent(ceiling)}",
            (0.99, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=8,
        )
    axes.set_ylim(0, top * 1.18)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_title("Prompt tokens found in cache (more is better)")


def _ttfts(axes: Any, results: Sequence[Result]) -> None:
    width = 0.8 / len(results)
    heights = [value for r in results for value in three(r.ttft_seconds) if value]
    spread = bool(heights) and max(heights) > 20 * min(heights)
    for place, r in enumerate(results):
        values = [value or 0.0 for value in three(r.ttft_seconds)]
        at = [group + (place - (len(results) - 1) / 2) * width for group in range(3)]
        bars = axes.bar(at, values, width * 0.92, color=_colour(r, results), label=r.strategy)
        axes.bar_label(bars, [seconds(value) for value in values], padding=2, fontsize=6.5, color=INK, rotation=45)
    axes.set_xticks(range(3), ["p50", "p95", "p99"])
    if spread:
        axes.set_yscale("log")
        axes.set_ylim(min(heights) * 0.6, max(heights) * 3)
    elif heights:
        axes.set_ylim(0, max(heights) * 1.25)
    axes.yaxis.set_major_formatter(_tick)
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Time to first token (less is better" + (", logarithmic)" if spread else ")"))


CROWDED = 100
"""Largest over smallest time above which labels at 1, 2 and 5 of each decade would overlap."""


def _distribution(axes: Any, results: Sequence[Result]) -> None:
    from matplotlib.ticker import LogLocator  # see plot_comparison

    lows, highs = [], []
    for r in results:
        if not r.ttft_percentiles:
            continue
        axes.plot(r.ttft_percentiles, range(101), color=_colour(r, results), label=r.strategy, linewidth=1.8)
        lows.append(max(r.ttft_percentiles[1], 1e-4))
        highs.append(r.ttft_percentiles[-1])
    if lows:
        axes.set_xscale("log")
        axes.set_xlim(min(lows) * 0.8, max(highs) * 1.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(highs) < CROWDED * min(lows) else (1,)))
    axes.xaxis.set_major_formatter(_tick)
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_ylim(0, 101)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.set_xlabel("time to first token")
    axes.set_title("Requests answering within (left is better)")
    axes.legend(frameon=False, fontsize=8, loc="best")


def _loads(axes: Any, results: Sequence[Result]) -> None:
    """The uncached tokens of each worker, the busiest first: a flat row is even work, a low one is little work."""
    labels = []
    for place, r in enumerate(results):
        computed = sorted((tally.uncached_tokens for tally in r.workers.values()), reverse=True)
        width = 0.84 / max(1, len(computed))
        at = [place - 0.42 + width * (rank + 0.5) for rank in range(len(computed))]
        axes.bar(at, computed, width * 0.9, color=_colour(r, results))
        mean = sum(computed) / len(computed) if computed else 0.0
        axes.hlines(mean, place - 0.44, place + 0.44, color=INK, linestyle="--", linewidth=1)
        skew = "-" if r.prefill_skew is None else f"{r.prefill_skew:.2f}"
        labels.append(f"{_label(r)}\nmax/mean {skew}")
    axes.set_xticks(range(len(results)), labels)
    axes.yaxis.set_major_formatter(lambda value, _: tokens(value))
    axes.set_title("Prompt tokens computed by each worker (dashed: mean)")


def plot_comparison(file: Path, results: Sequence[Result], title: str, ceiling: float | None = None) -> None:
    """Write the picture as PNG. `ceiling` is the hit rate of one cache as large as those of all workers together."""
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
        "axes.edgecolor": "#888888",
        "text.color": INK,
        "axes.grid": True,
        "grid.color": FAINT,
        "axes.axisbelow": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 8.4), layout="constrained")
        ((hits, ttfts), (distribution, loads)) = figure.subplots(2, 2)
        _hit_rates(hits, results, ceiling)
        _ttfts(ttfts, results)
        _distribution(distribution, results)
        _loads(loads, results)
        for axes in (hits, ttfts, loads):
            axes.grid(False, axis="x")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
