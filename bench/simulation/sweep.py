"""Sweeps: the same simulation for every combination of some parameters' values."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bench.curves import Curve, Panel, plot_curves
from bench.numbers import milliseconds, percent, ratio, seconds
from bench.result import Result, write_json
from bench.simulation.cluster import ClusterShape, kind_of_profile
from bench.simulation.play import Play, result_of
from bench.simulation.processes import Processes
from router.core.flow import FlowPolicy
from router.core.strategies import find_strategy

MOST_POINTS = 10_000
"""More combinations than this are taken for a mistake."""

Value = float | int | str


class SweepError(ValueError):
    """A sweep names what cannot be swept, or a value that it cannot have. The message says which."""


def _blocks(shape: ClusterShape, blocks: int) -> ClusterShape:
    longest = min(shape.engine.max_model_len, blocks * shape.engine.block_size)
    return replace(shape, engine=replace(shape.engine, blocks=blocks, max_model_len=longest))


def with_profile(shape: ClusterShape, name: str) -> ClusterShape:
    """The same cluster on another GPU: engine and latency are those of the profile. Raises `UnknownProfileError` and
    `EngineConfigError`."""
    kind = kind_of_profile(name, shape.engine)
    return replace(shape, engine=kind.engine, latency=kind.latency)


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(f"it must be {least} or more")
        return value

    return read


def _number(above_zero: bool) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not (value > 0 if above_zero else value >= 0) or value == float("inf"):
            raise ValueError("it must be a number above 0" if above_zero else "it must be 0 or a number above")
        return value

    return read


def _strategy(text: str) -> str:
    find_strategy(text)
    return text


def _switch(text: str) -> str:
    if text not in ("on", "off"):
        raise ValueError("it must be on or off")
    return text


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One thing that can be swept: how a value is read, and what it changes. `read` raises `ValueError`."""

    read: Callable[[str], Value]
    apply: Callable[[Play, Any], Play]


PARAMETERS: Mapping[str, _Parameter] = {
    "workers": _Parameter(_whole(1), lambda play, n: replace(play, shape=replace(play.shape, workers=n))),
    "strategy": _Parameter(_strategy, lambda play, name: replace(play, strategy=name)),
    "rate": _Parameter(_number(True), lambda play, r: replace(play, workload=replace(play.workload, rate=r))),
    "seed": _Parameter(_whole(0), lambda play, n: replace(play, workload=replace(play.workload, seed=n))),
    "limit": _Parameter(_whole(1), lambda play, n: replace(play, workload=replace(play.workload, limit=n))),
    "profile": _Parameter(str, lambda play, name: replace(play, shape=with_profile(play.shape, name))),
    "blocks": _Parameter(_whole(1), lambda play, n: replace(play, shape=_blocks(play.shape, n))),
    "cpuBlocks": _Parameter(
        _whole(0),
        lambda play, n: replace(play, shape=replace(play.shape, engine=replace(play.shape.engine, cpu_blocks=n))),
    ),
    "routers": _Parameter(
        _whole(1),
        lambda play, n: replace(
            play,
            scenario=play.scenario.model_copy(
                update={"routers": play.scenario.routers.model_copy(update={"count": n})}
            ),
        ),
    ),
    "networkDelay": _Parameter(_number(False), lambda play, s: replace(play, delays=replace(play.delays, network=s))),
    "flowControl": _Parameter(
        _switch, lambda play, on: replace(play, flow=(play.flow or FlowPolicy()) if on == "on" else None)
    ),
    "feedDelay": _Parameter(_number(False), lambda play, s: replace(play, delays=replace(play.delays, feed=s))),
}
"""In the order in which they are applied: a number of blocks is that of the swept profile."""


def parse_axes(given: Sequence[str]) -> dict[str, list[Value]]:
    """The values of each parameter, of texts like `workers=2,4,8`. Raises `SweepError`."""
    axes: dict[str, list[Value]] = {}
    for text in given:
        name, _, listed = text.partition("=")
        parameter = PARAMETERS.get(name)
        values = [part.strip() for part in listed.split(",") if part.strip()]
        if parameter is None or not values:
            known = ", ".join(PARAMETERS)
            raise SweepError(f"--sweep {text!r}: write NAME=VALUE,VALUE,... with one of these names: {known}")
        if name in axes:
            raise SweepError(f"--sweep {text!r}: {name} is swept already; give all its values at once")
        try:
            axes[name] = list(dict.fromkeys(parameter.read(value) for value in values))
        except ValueError as error:
            raise SweepError(f"--sweep {text!r}: {error}") from None
    count = 1
    for swept in axes.values():
        count *= len(swept)
    if count > MOST_POINTS:
        raise SweepError(f"--sweep: these are {count:,} simulations; {MOST_POINTS:,} at most")
    return axes


def grid(axes: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """Every combination; the last parameter changes fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def applied(play: Play, point: Mapping[str, Value]) -> Play:
    """The simulation with these values. Raises `ValueError` if they do not go together."""
    for name, parameter in PARAMETERS.items():
        if name in point:
            play = parameter.apply(play, point[name])
    return play


FIGURES: Mapping[str, Callable[[Result], float | None]] = {
    "requests": lambda result: result.requests,
    "errors": lambda result: result.errors,
    "hit_rate": lambda result: result.hit_rate,
    "ttft_p50_seconds": lambda result: result.ttft_seconds.p50 if result.ttft_seconds else None,
    "ttft_p95_seconds": lambda result: result.ttft_seconds.p95 if result.ttft_seconds else None,
    "ttft_p99_seconds": lambda result: result.ttft_seconds.p99 if result.ttft_seconds else None,
    "tpot_p50_seconds": lambda result: result.tpot_seconds.p50 if result.tpot_seconds else None,
    "tpot_p95_seconds": lambda result: result.tpot_seconds.p95 if result.tpot_seconds else None,
    "computed_tokens": lambda result: result.computed_tokens,
    "prefill_skew": lambda result: result.prefill_skew,
    "duration_seconds": lambda result: result.duration_seconds,
}
"""What is kept of each simulation."""


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation of a sweep."""

    values: Mapping[str, Value]
    result: Result

    def row(self) -> dict[str, Value | None]:
        """The parameters and the figures."""
        return {**self.values, **{name: figure(self.result) for name, figure in FIGURES.items()}}


def run_sweep(
    play: Play,
    axes: Mapping[str, Sequence[Value]],
    jobs: int | None = None,
    done: Callable[[int], None] = lambda played: None,
) -> list[Point]:
    """Every combination, in the order of `grid`. Raises `SweepError`, and what `play_out` raises."""
    points = grid(axes)
    plays = []
    for point in points:
        try:
            plays.append(applied(play, point))
            plays[-1].check()
        except ValueError as error:
            at = ", ".join(f"{name}={value}" for name, value in point.items())
            raise SweepError(f"--sweep {at}: {error}") from None
    with Processes(jobs) as processes:
        results = processes.map(result_of, plays, done)
    return [Point(point, result) for point, result in zip(points, results, strict=True)]


def write_sweep(points: Sequence[Point], out: Path) -> None:
    """Write `sweep.json` (with the whole results) and `sweep.csv` (the figures) to the folder `out`."""
    write_json(out / "sweep.json", {"points": [{"values": p.values, "result": p.result} for p in points]})
    with (out / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [point.row() for point in points]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_sweep(console: Console, points: Sequence[Point]) -> None:
    """A row for each simulation."""
    names = list(points[0].values)
    figures = ("errors", "hit rate", "TTFT p50", "p95", "TPOT p50", "p95", "max/mean")
    table = Table(*(Column(name) for name in names), *(Column(name, justify="right") for name in figures))
    for point in points:
        row, result = point.row(), point.result
        table.add_row(
            *(f"{value:g}" if isinstance(value, float) else str(value) for value in point.values.values()),
            f"{result.errors:,}",
            percent(result.hit_rate),
            *(seconds(_float(row[name])) for name in ("ttft_p50_seconds", "ttft_p95_seconds")),
            *(milliseconds(_float(row[name])) for name in ("tpot_p50_seconds", "tpot_p95_seconds")),
            ratio(result.prefill_skew),
        )
    console.print(table)


def _float(value: Value | None) -> float | None:
    return value if isinstance(value, float) else None


def plot_sweep(file: Path, points: Sequence[Point], title: str) -> None:
    """Draw the figures against the number with the most values; the other parameters tell the lines apart. Raises
    `ModuleNotFoundError` without matplotlib."""
    values = {name: list(dict.fromkeys(point.values[name] for point in points)) for name in points[0].values}
    numbers = [name for name, found in values.items() if not isinstance(found[0], str) and len(found) > 1]
    along = max(numbers, key=lambda name: len(values[name])) if numbers else next(iter(values))
    names = [str(value) for value in values[along]] if isinstance(values[along][0], str) else []
    lines: dict[str, list[Point]] = {}
    for point in points:
        others = (f"{name} {value}" for name, value in point.values.items() if name != along)
        lines.setdefault(", ".join(others), []).append(point)

    def at(point: Point) -> float:
        value = point.values[along]
        return float(names.index(value)) if isinstance(value, str) else float(value)

    def curves(figure: str) -> list[Curve]:
        return [
            Curve(label, sorted((at(point), FIGURES[figure](point.result)) for point in line))
            for label, line in lines.items()
        ]

    panels = [
        Panel("Prompt tokens found in cache", curves("hit_rate"), percent),
        Panel("Time to first token, p50", curves("ttft_p50_seconds"), seconds),
        Panel("Time to first token, p95", curves("ttft_p95_seconds"), seconds),
        Panel("Time per output token, p95", curves("tpot_p95_seconds"), milliseconds),
    ]
    plot_curves(file, panels, title, along, names=names)
