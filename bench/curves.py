"""Figures against a parameter as a picture: one panel for each figure, one line for each series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.plot import INK, plain, styled

LINE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555")
"""The palette of Okabe and Ito, whose colours can be told apart with every kind of colour vision."""
MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: figures at some values of the parameter, None where there is none."""

    label: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure."""

    title: str
    curves: Sequence[Curve]
    written: Callable[[float], str]
    """A value of the figure in words."""
    bound: float | None = None
    """Drawn as a dashed line: the figure should not be above it."""
    zero: bool = True
    """Whether the axis begins at 0."""


def plot_curves(
    file: Path,
    panels: Sequence[Panel],
    title: str,
    parameter: str,
    *,
    names: Sequence[str] = (),
    chosen: float | None = None,
) -> None:
    """Write the panels, two in a row, as PNG or SVG (the file's ending says which).

    `names`: the values 0, 1, ... of a parameter that is no number. `chosen`: a value of it that is marked. Raises
    `ModuleNotFoundError` without matplotlib.
    """
    rows = -(-len(panels) // 2)
    with styled(**{"svg.hashsalt": "kvcluster"}) as figure_type:
        from matplotlib.ticker import FuncFormatter, MaxNLocator  # see styled

        figure = figure_type(figsize=(12, 1.0 + 3.7 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            whole = True
            for number, curve in enumerate(panel.curves):
                points = [(x, y) for x, y in curve.points if y is not None]
                whole = whole and all(float(x).is_integer() for x, _ in points)
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=LINE_COLOURS[number % len(LINE_COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=5,
                    linewidth=1.8,
                    label=curve.label,
                )
            if panel.bound is not None:
                axes.axhline(panel.bound, color=INK, linestyle="--", linewidth=1)
                axes.annotate(
                    f"at most {panel.written(panel.bound)}",
                    (0.99, panel.bound),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
            if chosen is not None:
                axes.axvline(chosen, color=INK, linestyle=":", linewidth=1)
            values = [y for curve in panel.curves for _, y in curve.points if y is not None]
            if values and min(values) > 0 and max(values) > 30 * min(values):
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            elif panel.zero and values:
                axes.set_ylim(0, max([*values, panel.bound or 0.0]) * 1.15 or 1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, panel=panel: panel.written(value)))
            if names:
                axes.set_xticks(range(len(names)), names)
            elif whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(parameter)
            axes.set_title(panel.title)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        if len(panels[0].curves) > 1:
            grid.flat[0].legend(frameon=False, fontsize=8, loc="best")
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
