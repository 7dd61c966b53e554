"""Results as tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from bench.result import Result, Summary

TOLERATED_ERRORS = 0.01
"""A strategy that fails more than this share of the requests cannot win."""


def seconds(value: float | None) -> str:
    """A time, in the unit that suits its size."""
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def milliseconds(value: float | None) -> str:
    """A time between two tokens."""
    return "-" if value is None else f"{value * 1e3:.1f} ms"


def ratio(value: float | None) -> str:
    """Largest over mean, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def tokens(value: float) -> str:
    """A number of tokens, rounded to about three digits."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f} k" if value < 1e6 else f"{value / 1e6:,.2f} M"


def _p50(result: Result) -> float:
    return result.ttft_seconds.p50 if result.ttft_seconds else float("inf")


def winner(results: Sequence[Result]) -> Result:
    """The strategy with the smallest TTFT p50, among those that answer their requests."""
    return min(results, key=lambda r: (r.errors > TOLERATED_ERRORS * r.requests, _p50(r)))


def why(results: Sequence[Result]) -> str:
    """One sentence: which strategy won, and why."""
    best = winner(results)
    others = sorted((r for r in results if r is not best), key=_p50)
    if best.ttft_seconds is None:
        return "No strategy answered a request."
    said = f"{best.strategy} starts answering soonest: TTFT p50 {seconds(best.ttft_seconds.p50)}"
    if not others or others[0].ttft_seconds is None:
        return said + "."
    said += f" against {seconds(others[0].ttft_seconds.p50)} ({others[0].strategy}), the next best"
    if not all(best.computed_tokens < other.computed_tokens for other in others):
        skews = [other.prefill_skew for other in others if other.computed_tokens <= best.computed_tokens]
        if best.prefill_skew is not None and all(skew is not None and skew > best.prefill_skew for skew in skews):
            return said + f"; its busiest worker computed only {best.prefill_skew:.2f} times the mean."
        return said + "."
    least = min(other.computed_tokens for other in others)
    return said + (
        f", because {percent(best.hit_rate)} of the prompt tokens were cached where it sent them, so the workers "
        f"computed {tokens(best.computed_tokens)} prompt tokens instead of {tokens(least)} or more."
    )


def comparison_table(results: Sequence[Result], ceiling: float | None = None) -> Table:
    """A row for each strategy, the winner in bold. `ceiling` is the hit rate of the pooled cache."""
    figures = (
        "hit rate", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "prefill",
        "max/mean", "running",
    )  # fmt: skip
    columns = (Column(heading, justify="right") for heading in figures)
    table = Table("strategy", *columns, title="Strategies, best TTFT p50 first", title_justify="left")
    best = winner(results)
    for r in sorted(results, key=_p50):
        table.add_row(
            r.strategy,
            percent(r.hit_rate),
            *(seconds(value) for value in three(r.ttft_seconds)),
            *(milliseconds(value) for value in three(r.tpot_seconds)[:2]),
            tokens(r.computed_tokens),
            ratio(r.prefill_skew),
            ratio(r.running_skew),
            style="bold green" if r is best else "",
        )
    if ceiling is not None:
        table.add_row("pooled ceiling", percent(ceiling), style="dim")
    return table


def three(summary: Summary | None) -> tuple[float | None, float | None, float | None]:
    """p50, p95 and p99, where there are any."""
    return (summary.p50, summary.p95, summary.p99) if summary else (None, None, None)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def print_bottleneck(console: Console, result: Result) -> None:
    """Says so when the load generator, and not the cluster, set the figures."""
    if result.loadgen is not None and result.loadgen.bottleneck:
        console.print(
            f"[bold yellow]The load generator was itself a bottleneck[/] ({result.strategy}): "
            f"{'; '.join(result.loadgen.bottleneck)}. Lower the rate or --speed, or run it on another machine."
        )


def print_result(console: Console, result: Result) -> None:
    """One run."""
    columns = (Column(heading, justify="right") for heading in ("requests", "avg", "p50", "p95", "p99"))
    title = f"{result.config.get('workload', '')} · {result.strategy}"
    table = Table("", *columns, title=title, title_justify="left")
    rows = (
        ("TTFT", result.requests - result.errors, result.ttft_seconds),
        ("  hit", result.hit.requests, result.hit.ttft_seconds),
        ("  miss", result.miss.requests, result.miss.ttft_seconds),
        ("latency", result.requests - result.errors, result.latency_seconds),
        ("TPOT", result.requests - result.errors, result.tpot_seconds),
    )
    for name, count, summary in rows:
        shown = milliseconds if name == "TPOT" else seconds
        table.add_row(name, f"{count:,}", shown(summary.avg if summary else None), *map(shown, three(summary)))
    console.print(table)
    console.print(
        f"hit rate {percent(result.hit_rate)}; {tokens(result.computed_tokens)} prompt tokens computed, "
        f"max/mean of the {len(result.workers)} workers {ratio(result.prefill_skew)}, of the answers in progress "
        f"{ratio(result.running_skew)}; {result.duration_seconds:.1f} emulated s"
    )
    if result.reasons:
        console.print(f"reasons: {_counts(result.reasons)}")
    if result.error_causes:
        console.print(f"[bold red]{result.errors:,} errors[/]: {_counts(result.error_details)}")
    print_bottleneck(console, result)


def print_comparison(console: Console, results: Sequence[Result], ceiling: float | None = None) -> None:
    """All strategies, and why the winner won."""
    console.print(comparison_table(results, ceiling))
    console.print(why(results))
    for result in results:
        if result.error_causes:
            console.print(f"[bold red]{result.strategy}: {result.errors:,} errors[/]: {_counts(result.error_details)}")
        print_bottleneck(console, result)
