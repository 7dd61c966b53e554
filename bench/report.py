"""Results as tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bench.experiment import Outcome
from bench.figures import BY_NAME
from bench.numbers import count, milliseconds, percent, rate, ratio, seconds, tokens
from bench.result import Result, Summary

TOLERATED_ERRORS = 0.01
"""A contender that fails more than this share of the requests cannot win."""

SHOWN = (
    "hit_rate", "ttft_p50_seconds", "ttft_p95_seconds", "ttft_p99_seconds", "tpot_p50_seconds", "tpot_p95_seconds",
    "computed_tokens", "prefill_skew", "running_skew",
)  # fmt: skip
SHOWN_WITH_INTERVALS = ("hit_rate", "ttft_p50_seconds", "ttft_p95_seconds", "tpot_p95_seconds", "prefill_skew")
"""Fewer columns: with intervals they are wider, and a search adds one."""


def highest_rate(outcome: Outcome) -> str:
    """What a search found, in words."""
    if outcome.found is None:
        return "-"
    bracket = outcome.found.bracket
    if bracket.passed is None:
        return f"below {rate(bracket.failed)}"
    return rate(bracket.passed) if bracket.failed is not None else f"above {rate(bracket.passed)}"


def _failing(outcome: Outcome) -> bool:
    errors = sum(result.errors for result in outcome.results)
    return errors > TOLERATED_ERRORS * sum(result.requests for result in outcome.results)


def _rank(outcome: Outcome) -> tuple[bool, float]:
    if outcome.found is not None:
        return False, -(outcome.found.bracket.passed or 0.0)
    p50 = outcome.mean("ttft_p50_seconds")
    return _failing(outcome), float("inf") if p50 is None else p50


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The winner first: after a search that with the highest rate, else that with the smallest TTFT p50 among those
    that answer their requests."""
    return sorted(outcomes, key=_rank)


def why(outcomes: Sequence[Outcome]) -> str:
    """Which contender won, and why, in a sentence or two."""
    best, *others = ranked(outcomes)
    if best.found is not None:
        return _why_rate(best, others)
    p50 = best.mean("ttft_p50_seconds")
    if p50 is None:
        return "No strategy answered a request."
    said = f"{best.contender} starts answering soonest: TTFT p50 {seconds(p50)}"
    if not _failing(best):
        failing = [other for other in others if _failing(other)]
        others = [other for other in others if other not in failing]
        if failing:
            names = ", ".join(other.contender for other in failing)
            said = f"Of those that fail at most {TOLERATED_ERRORS:.0%} of the requests ({names} fail more), {said}"
    next_best = others[0].mean("ttft_p50_seconds") if others else None
    if next_best is None:
        return said + "."
    said += f" against {seconds(next_best)} ({others[0].contender}), the next best"
    lead = best.versus(others[0], "ttft_p50_seconds")
    if lead is not None and lead.high is not None and lead.high >= 0:
        return said + f"; {lead.n} repeats do not tell that difference from chance."
    computed = best.mean("computed_tokens") or 0.0
    theirs = [other.mean("computed_tokens") or 0.0 for other in others]
    if not all(computed < each for each in theirs):
        skew = best.mean("prefill_skew")
        skews = [other.mean("prefill_skew") for other, each in zip(others, theirs, strict=True) if each <= computed]
        if skew is not None and all(each is not None and each > skew for each in skews):
            return said + f"; its busiest worker computed only {skew:.2f} times the mean."
        return said + "."
    return said + (
        f", because {percent(best.mean('hit_rate'))} of the prompt tokens were cached where it sent them, so the "
        f"workers computed {tokens(computed)} prompt tokens instead of {tokens(min(theirs))} or more."
    )


def _why_rate(best: Outcome, others: Sequence[Outcome]) -> str:
    if best.found is None or best.found.bracket.passed is None:
        return "No contender met the SLO at any rate that was tried."
    options = best.found.options
    said = (
        f"{best.contender} serves the most: {highest_rate(best)} with {options.attainment:.0%} of the requests within "
        f"{options.slo}"
    )
    rest = [f"{other.contender} {highest_rate(other)}" for other in others]
    return said + (f", against {', '.join(rest)}." if rest else ".")


def columns(outcomes: Sequence[Outcome], *, narrow: bool = False) -> list[str]:
    """The figures that a table of these outcomes has; `narrow`: in a terminal."""
    wide = any(len(outcome.runs) > 1 or outcome.found is not None for outcome in outcomes)
    shown = list(SHOWN_WITH_INTERVALS if wide and narrow else SHOWN)
    if any(result.goodput is not None for outcome in outcomes for result in outcome.results):
        shown += ["attainment"] if narrow else ["goodput", "attainment"]
    if any(result.errors for outcome in outcomes for result in outcome.results):
        shown.append("errors")
    return shown


def _short(names: Sequence[str]) -> list[str]:
    """Headings: `TTFT p50`, and after it `p95`."""
    headings = []
    for before, name in zip(("", *names), names, strict=False):
        same = before.partition("_p")[0] == name.partition("_p")[0]
        headings.append(BY_NAME[name].short if same or "_p" not in name else BY_NAME[name].heading)
    return headings


def cells(outcome: Outcome, names: Sequence[str]) -> list[str]:
    """The figures of one contender."""
    return [BY_NAME[name].estimated(outcome.estimate(name)) for name in names]


def comparison_table(outcomes: Sequence[Outcome], ceiling: float | None = None) -> Table:
    """A row for each contender, the winner in bold. `ceiling` is the hit rate of the pooled cache."""
    names = columns(outcomes, narrow=True)
    searched = any(outcome.found is not None for outcome in outcomes)
    headings = ["highest rate"] if searched else []
    headings += _short(names)
    runs = max(len(outcome.runs) for outcome in outcomes)
    title = "Contenders, best first"
    if runs > 1:
        title += f": means of {runs} runs ± half the 95 % confidence interval"
    strategy = Column("strategy", overflow="fold", min_width=min(14, max(len(each.contender) for each in outcomes)))
    figures = (Column(each, justify="right", no_wrap=True) for each in headings)
    table = Table(strategy, *figures, title=title, title_justify="left")
    first, *_ = best_first = ranked(outcomes)
    for outcome in best_first:
        row = [highest_rate(outcome)] if searched else []
        row += cells(outcome, names)
        table.add_row(Text(outcome.contender), *row, style="bold green" if outcome is first else "")
    if ceiling is not None:
        row = [""] if searched else []
        table.add_row("pooled ceiling", *row, percent(ceiling), style="dim")
    return table


def three(summary: Summary | None) -> tuple[float | None, float | None, float | None]:
    """p50, p95 and p99, where there are any."""
    return (summary.p50, summary.p95, summary.p99) if summary else (None, None, None)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def print_bottleneck(console: Console, result: Result) -> None:
    """Says so when the load generator, and not the cluster, set the figures."""
    if result.loadgen is not None and result.loadgen.bottleneck:
        console.print(
            Text("The load generator was itself a bottleneck", "bold yellow"),
            Text(
                f"({result.strategy}): {'; '.join(result.loadgen.bottleneck)}. Lower the rate or --speed, or run it on "
                "another machine."
            ),
        )


def print_errors(console: Console, result: Result) -> None:
    """How many requests failed, and why."""
    if result.error_causes:
        console.print(
            Text(f"{result.strategy}: {result.errors:,} errors:", "bold red"), Text(_counts(result.error_details))
        )


def print_result(console: Console, result: Result) -> None:
    """One run."""
    headings = (Column(heading, justify="right") for heading in ("requests", "avg", "p50", "p95", "p99"))
    title = Text(f"{result.config.get('workload', '')} · {result.strategy}")
    table = Table("", *headings, title=title, title_justify="left")
    rows = (
        ("TTFT", result.requests - result.errors, result.ttft_seconds),
        ("  hit", result.hit.requests, result.hit.ttft_seconds),
        ("  miss", result.miss.requests, result.miss.ttft_seconds),
        ("latency", result.requests - result.errors, result.latency_seconds),
        ("TPOT", result.requests - result.errors, result.tpot_seconds),
    )
    for name, number, summary in rows:
        shown = milliseconds if name == "TPOT" else seconds
        table.add_row(name, f"{number:,}", shown(summary.avg if summary else None), *map(shown, three(summary)))
    console.print(table)
    console.print(
        f"hit rate {percent(result.hit_rate)}; {tokens(result.computed_tokens)} prompt tokens computed, "
        f"max/mean of the {len(result.workers)} workers {ratio(result.prefill_skew)}, of the answers in progress "
        f"{ratio(result.running_skew)}; {result.duration_seconds:.1f} emulated s"
    )
    if result.goodput is not None:
        met = result.goodput
        console.print(
            f"SLO {met.slo}: {percent(met.attainment)} of the requests met it, goodput {rate(met.requests_per_second)} "
            f"(late {count(met.late)}, slow {count(met.slow)}, failed {count(met.failed)})"
        )
    if result.reasons:
        console.print(f"reasons: {_counts(result.reasons)}")
    print_errors(console, result)
    print_bottleneck(console, result)


def print_comparison(console: Console, outcomes: Sequence[Outcome], ceiling: float | None = None) -> None:
    """All contenders, and why the winner won."""
    console.print(comparison_table(outcomes, ceiling))
    console.print(Text(why(outcomes)))
    for outcome in outcomes:
        for result in outcome.results:
            print_errors(console, result)
            print_bottleneck(console, result)
