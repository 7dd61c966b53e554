"""The figures that are compared: how each is found in a result, what it is called, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.estimates import Estimate
from bench.numbers import count, milliseconds, percent, rate, ratio, seconds, tokens
from bench.result import Result, Summary

_UNITS = ((" ms", 1e3), ("%", 1e2), (" s", 1.0), ("/s", 1.0), (" k", 1e-3), (" M", 1e-6))
"""What figures are shown in, and by how much they are multiplied for it."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a result."""

    name: str
    """In files."""
    heading: str
    short: str
    """The heading in a narrow table, whose columns stand in the order of `FIGURES`."""
    of: Callable[[Result], float | None]
    show: Callable[[float | None], str]
    better: int
    """1: more is better; -1: less is."""

    def estimated(self, estimate: Estimate | None) -> str:
        """The mean and half the width of its interval in the mean's unit, as `27 ms ± 2 ms`."""
        if estimate is None:
            return "-"
        shown = self.show(estimate.mean)
        if estimate.margin is None:
            return shown
        for unit, factor in _UNITS:
            if shown.endswith(unit):
                number = shown.removesuffix(unit)
                digits = len(number.partition(".")[2])
                return f"{number} ± {estimate.margin * factor:,.{digits}f}{unit}"
        return f"{shown} ± {self.show(estimate.margin)}"


def _of(summary: Callable[[Result], Summary | None], name: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found = summary(result)
        return None if found is None else float(getattr(found, name))

    return value


def _ttft(result: Result) -> Summary | None:
    return result.ttft_seconds


def _tpot(result: Result) -> Summary | None:
    return result.tpot_seconds


def _latency(result: Result) -> Summary | None:
    return result.latency_seconds


FIGURES = (
    Figure("hit_rate", "hit rate", "hit rate", lambda r: r.hit_rate, percent, 1),
    Figure("ttft_p50_seconds", "TTFT p50", "TTFT p50", _of(_ttft, "p50"), seconds, -1),
    Figure("ttft_p95_seconds", "TTFT p95", "p95", _of(_ttft, "p95"), seconds, -1),
    Figure("ttft_p99_seconds", "TTFT p99", "p99", _of(_ttft, "p99"), seconds, -1),
    Figure("tpot_p50_seconds", "TPOT p50", "TPOT p50", _of(_tpot, "p50"), milliseconds, -1),
    Figure("tpot_p95_seconds", "TPOT p95", "p95", _of(_tpot, "p95"), milliseconds, -1),
    Figure("latency_p50_seconds", "latency p50", "latency p50", _of(_latency, "p50"), seconds, -1),
    Figure("latency_p95_seconds", "latency p95", "p95", _of(_latency, "p95"), seconds, -1),
    Figure("computed_tokens", "prefill tokens", "prefill", lambda r: r.computed_tokens, tokens, -1),
    Figure("prefill_skew", "max/mean prefill", "max/mean", lambda r: r.prefill_skew, ratio, -1),
    Figure("running_skew", "max/mean running", "running", lambda r: r.running_skew, ratio, -1),
    Figure("requests_per_second", "answered", "answered", lambda r: r.requests_per_second, rate, 1),
    Figure("goodput", "goodput", "goodput", lambda r: r.goodput.requests_per_second if r.goodput else None, rate, 1),
    Figure("attainment", "SLO met", "SLO met", lambda r: r.goodput.attainment if r.goodput else None, percent, 1),
    Figure("errors", "errors", "errors", lambda r: r.errors, count, -1),
)
BY_NAME = {figure.name: figure for figure in FIGURES}
