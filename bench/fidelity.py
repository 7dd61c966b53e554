"""Simulated runs beside live ones of the same workload and seed: the table of docs/simulator.md.

    python -m bench.fidelity rag/moderate=live1.jsonl:simulated1.jsonl rag/moderate=live2.jsonl:simulated2.jsonl ...

Each argument names a case and the records of one live run and of its simulation (`--raw` of `compare` and `simulate`).
Runs of one case, which differ by the seed, become one row: the mean of the differences and their range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench.record import Record, read_records
from bench.result import RunInfo, summarise

BOUNDS: Mapping[str, float] = {"hit_rate": 0.01, "ttft_p50": 0.05, "ttft_p95": 0.10, "tpot_p50": 0.05}
"""The most by which a simulation may differ: the hit rate in points, the times as shares of the live ones."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Seconds."""

    hit_rate: float
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float


def figures(records: Sequence[Record]) -> Figures:
    """The figures of a run. Raises `ValueError` if none of its requests was answered."""
    result = summarise(records, RunInfo("", 0, {}))
    if result.ttft_seconds is None or result.tpot_seconds is None or result.hit_rate is None:
        raise ValueError("no request of this run was answered")
    return Figures(result.hit_rate, result.ttft_seconds.p50, result.ttft_seconds.p95, result.tpot_seconds.p50)


def differences(live: Figures, simulated: Figures) -> dict[str, float]:
    """Simulated less live: the hit rate in points / 100, the times as shares of the live ones."""
    found = {"hit_rate": simulated.hit_rate - live.hit_rate}
    for name in ("ttft_p50", "ttft_p95", "tpot_p50"):
        measured = getattr(live, name)
        found[name] = (getattr(simulated, name) - measured) / measured
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """The runs of one workload under one load."""

    name: str
    live: Sequence[Figures]
    simulated: Sequence[Figures]

    def differences(self, figure: str) -> list[float]:
        """Of each run."""
        return [differences(*pair)[figure] for pair in zip(self.live, self.simulated, strict=True)]

    def within(self, figure: str) -> bool:
        """Whether the mean of the differences is."""
        return abs(fmean(self.differences(figure))) <= BOUNDS[figure]


def _cell(case: Case, figure: str) -> str:
    """The mean of the live figure, that of the simulated one, and the differences."""
    live = fmean(getattr(each, figure) for each in case.live)
    simulated = fmean(getattr(each, figure) for each in case.simulated)
    found = case.differences(figure)
    mean, low, high = (100 * value for value in (fmean(found), min(found), max(found)))
    if figure == "hit_rate":
        shown, unit = f"{100 * live:.1f} / {100 * simulated:.1f} %", "pt"
    else:
        shown, unit = f"{1e3 * live:.1f} / {1e3 * simulated:.1f} ms", "%"
    mark = "" if case.within(figure) else " **off**"
    return f"{shown}, {mean:+.1f} {unit} ({low:+.1f} to {high:+.1f}){mark}"


def markdown(cases: Iterable[Case]) -> str:
    """A table: live / simulated, and the mean difference with its range."""
    lines = [
        "| case | runs | hit rate | TTFT p50 | TTFT p95 | TPOT p50 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        cells = " | ".join(_cell(case, figure) for figure in BOUNDS)
        lines.append(f"| {case.name} | {len(case.live)} | {cells} |")
    return "\n".join(lines) + "\n"


def read_cases(given: Iterable[str]) -> list[Case]:
    """The cases of arguments as above. Raises `ValueError` and `RecordError`."""
    runs: dict[str, list[tuple[Figures, Figures]]] = {}
    for text in given:
        name, equals, files = text.partition("=")
        live, colon, simulated = files.partition(":")
        if not (equals and colon):
            raise ValueError(f"{text!r}: write CASE=LIVE:SIMULATED, two files of records")
        pair = figures(read_records(Path(live))), figures(read_records(Path(simulated)))
        runs.setdefault(name, []).append(pair)
    return [Case(name, [live for live, _ in pairs], [each for _, each in pairs]) for name, pairs in runs.items()]


def main() -> None:
    """The command line above. Exit code 1: a mean is off its bound."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="CASE=LIVE:SIMULATED")
    cases = read_cases(parser.parse_args().runs)
    sys.stdout.write(markdown(cases))
    sys.exit(not all(case.within(figure) for case in cases for figure in BOUNDS))


if __name__ == "__main__":
    main()
