"""Figures as tables for a terminal, as JSON, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import orjson
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvcluster.figures.figures import Distribution, EngineFigures, Figures, WorkerFigures
from kvcluster.terminal import plain

BAR = 30
"""Columns of the longest bar."""
INTERPOLATED = "p50, p95 and p99 are interpolated within the buckets of the histograms"


@dataclass(frozen=True, slots=True)
class Period:
    """Figures and what they cover."""

    name: str
    """`since_start` (of each router's process) or `window`."""
    seconds: float | None
    """Length of a window."""
    figures: Figures


@dataclass(frozen=True, slots=True)
class Report:
    """All that the command says."""

    routers: tuple[str, ...]
    periods: tuple[Period, ...]
    unread: tuple[str, ...] = ()
    """Workers whose metrics could not be read, each with the reason."""


def as_json(report: Report) -> str:
    """One document."""
    return orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


# --- CSV ---


def as_csv(report: Report) -> str:
    """One row for each value: `period, group, name, labels, figure, value`. Values that do not exist have no row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("period", "group", "name", "labels", "figure", "value"))
    for period in report.periods:
        for row in _rows(period.figures):
            if row[-1] is not None:
                writer.writerow((period.name, *map(_cell, row)))
    return out.getvalue()


def _cell(value: object) -> object:
    """Text as a spreadsheet reads it as text: some take what begins like this for a formula."""
    if not isinstance(value, str):
        return value
    return "'" + plain(value) if value[:1] in ("=", "+", "-", "@") else plain(value)


Row = tuple[str, str, str, str, object]


def _rows(figures: Figures) -> Iterator[Row]:
    for status, count in figures.requests.items():
        yield "requests", status, "", "requests", count
    for reason, count in figures.decisions.items():
        yield "decisions", reason, "", "decisions", count
    for direction, tokens in figures.mispredicted_cached_tokens.items():
        yield "cache", direction, "", "mispredicted_cached_tokens", tokens
    for name in ("prompt_tokens", "cached_tokens", "predicted_cached_tokens", "hit_rate"):
        yield "cache", "", "", name, getattr(figures, name)
    for each in figures.latencies:
        yield from _distribution_rows("latency_seconds", each.name, each)
    if figures.ttft_actual_to_predicted is not None:
        yield from _distribution_rows("ttft_actual_to_predicted", "", figures.ttft_actual_to_predicted)
    if figures.matched_blocks is not None:
        yield from _distribution_rows("matched_blocks", "", figures.matched_blocks)
    for bucket in figures.match_lengths:
        yield "matched_blocks", _range(bucket.above, bucket.up_to), "", "requests", bucket.requests
    for worker in figures.workers:
        for name, value in asdict(worker).items():
            if name != "worker":
                yield "worker", worker.worker, "", name, value
    for engine in figures.engines:
        for name, value in asdict(engine).items():
            if name not in ("worker", "url", "latencies"):
                yield "engine", engine.worker, engine.url, name, value
        for each in engine.latencies:
            yield from _distribution_rows("engine_latency_seconds", engine.worker, each, {"metric": each.name})


def _distribution_rows(group: str, name: str, of: Distribution, more: Mapping[str, str] | None = None) -> Iterator[Row]:
    labels = ";".join(f"{key}={value}" for key, value in {**(more or {}), **of.labels}.items())
    for figure in ("count", "mean", "p50", "p95", "p99"):
        yield group, name, labels, figure, getattr(of, figure)


def _range(above: int | None, up_to: int | None) -> str:
    """The blocks of a bucket; its lower bound is exclusive."""
    low = 0 if above is None else above + 1
    if up_to is None:
        return f"{low} or more"
    return str(low) if low >= up_to else f"{low} to {up_to}"


# --- tables ---


def rendered(report: Report) -> RenderableType:
    """Everything, for a terminal."""
    parts: list[RenderableType] = [Text(", ".join(map(plain, report.routers)), style="bold")]
    for period in report.periods:
        title = "Since the start" if period.seconds is None else f"The last {period.seconds:.1f} s"
        parts += [Text(f"\n{title}", style="bold"), *_period(period.figures)]
    parts += [Text(f"not read: {plain(line)}", style="yellow") for line in report.unread]
    return Group(*parts, Text(f"\n{INTERPOLATED}", style="dim"))


def _period(figures: Figures) -> Iterable[RenderableType]:
    yield _indented(_summary(figures))
    if any(each.count for each in figures.latencies):
        yield _indented(_latencies(figures.latencies))
    if figures.match_lengths:
        yield _indented(_lengths(figures))
    if figures.workers:
        yield _indented(_workers(figures.workers))
    if figures.engines:
        yield _indented(_engines(figures.engines))


def _indented(table: Table) -> Padding:
    return Padding(table, (1, 0, 0, 2), expand=False)


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _counts(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = ", ".join(f"{plain(name)}: {count:,}" for name, count in counts.items())
    return f"{total:,}" + (f" ({parts})" if parts else "")


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


AVERAGES = {"avg": "mean", "p50": "p50", "p95": "p95", "p99": "p99"}


def _summary(figures: Figures) -> Table:
    rows = Table.grid(padding=(0, 2, 0, 0))
    of = f" ({figures.cached_tokens:,} of {figures.prompt_tokens:,} prompt tokens)" if figures.prompt_tokens else ""
    rows.add_row(Text("requests", style="dim"), Text(_counts(figures.requests)))
    rows.add_row(Text("decisions", style="dim"), Text(_counts(figures.decisions)))
    rows.add_row(Text("hit rate", style="dim"), Text(_percent(figures.hit_rate) + of))
    off = figures.mispredicted_cached_tokens
    wrong = f"; {off.get('over', 0):,} too many, {off.get('under', 0):,} too few" if off else ""
    rows.add_row(Text("predicted", style="dim"), Text(f"{figures.predicted_cached_tokens:,} cached tokens{wrong}"))
    ratio = figures.ttft_actual_to_predicted
    if ratio is not None and ratio.count:
        shown = ", ".join(f"{name} {getattr(ratio, figure):.2f}" for name, figure in AVERAGES.items())
        rows.add_row(Text("first token", style="dim"), Text(f"actual / predicted time: {shown}"))
    return rows


def duration(seconds: float | None, limit: float | None = None) -> str:
    """Milliseconds below 10 s; `≥` before a quantile that lies beyond the last bucket."""
    if seconds is None:
        return "-"
    shown = f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"
    return f"≥ {shown}" if seconds == limit else shown


def _latencies(rows: Iterable[Distribution]) -> Table:
    table = _table("time", "count", "avg", "p50", "p95", "p99")
    shown = ""
    for each in rows:
        if each.count:
            labels = ", ".join(f"{key}: {value}" for key, value in each.labels.items())
            name = f"  {labels}" if each.name == shown else " ".join((each.name.replace("_", " "), labels)).rstrip()
            shown = each.name
            quantiles = (duration(value, each.limit) for value in (each.p50, each.p95, each.p99))
            table.add_row(Text(plain(name)), f"{each.count:,}", duration(each.mean), *quantiles)
    return table


def _lengths(figures: Figures) -> Table:
    table = _table("blocks matched", "requests", "share")
    table.add_column("")
    total = sum(bucket.requests for bucket in figures.match_lengths)
    most = max(bucket.requests for bucket in figures.match_lengths)
    for bucket in figures.match_lengths:
        bar = "█" * max(1, round(BAR * bucket.requests / most))
        blocks = _range(bucket.above, bucket.up_to)
        table.add_row(blocks, f"{bucket.requests:,}", f"{bucket.requests / total:.1%}", Text(bar, style="cyan"))
    return table


def _workers(rows: Iterable[WorkerFigures]) -> Table:
    tokens = ("hit rate", "cached tokens", "prompt tokens")
    table = _table("worker", "requests", *tokens, "in flight", "running", "waiting", "blocks", "view age")
    for each in rows:
        age = "-" if each.view_age_seconds is None else f"{each.view_age_seconds:.1f} s"
        counts = map(_number, (each.cached_tokens, each.prompt_tokens, each.in_flight, each.running, each.waiting))
        table.add_row(
            Text(plain(each.worker)), f"{each.requests:,}", _percent(each.hit_rate), *counts, f"{each.blocks:,}", age
        )
    return table


ENGINE_TIMES = {"time_to_first_token": "TTFT", "request_time_per_output_token": "TPOT"}
"""What the table shows of an engine's times; JSON and CSV have all of them."""


def _engines(rows: Iterable[EngineFigures]) -> Table:
    times = [f"{name} {figure}".strip() for name in ENGINE_TIMES.values() for figure in AVERAGES]
    table = _table("engine", "requests", "hit rate", *times, "preempted")
    for each in rows:
        found = {one.name: one for one in each.latencies if not one.labels}
        cells: list[str] = []
        for name in ENGINE_TIMES:
            one = found.get(name)
            figures = (None,) * 4 if one is None else (one.mean, one.p50, one.p95, one.p99)
            cells += [duration(value, None if one is None else one.limit) for value in figures]
        counts = (f"{each.requests:,}", _percent(each.hit_rate))
        table.add_row(Text(plain(each.worker)), *counts, *cells, f"{each.preemptions:,}")
    return table
