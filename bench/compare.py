"""The same workload under one strategy after another, each on a cold cluster.

`bench.simulation.comparison` does that in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.plot import plot_comparison
from bench.record import Record, write_records
from bench.report import percent, print_comparison, seconds, why, winner
from bench.result import Result, write_json
from bench.run import BenchOptions, measure
from bench.workloads import Workload, build_workload

SUMMARY_FILE = "strategy_comparison_summary.json"
PLOT_FILE = "strategy_comparison.png"


@dataclass(frozen=True, slots=True)
class Target:
    """A running cluster."""

    url: str
    """Base of the data plane."""
    worker_ids: tuple[str, ...] = ()
    """As the router names workers in its answers. A worker without requests counts only if it is listed here."""


Launch = Callable[[str], AbstractAsyncContextManager[Target]]
"""Starts a cluster with this strategy and cold caches, ready to serve. Leaving the context stops the cluster."""


SUMMARISED = (
    "requests", "errors", "hit_rate", "ttft_seconds", "latency_seconds", "tpot_seconds", "computed_tokens",
    "prefill_skew", "running_skew",
)  # fmt: skip
"""The fields of a result that the comparison keeps."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All strategies side by side."""

    winner: str
    why: str
    ceiling_hit_rate: float | None
    """The hit rate of one cache as large as those of all workers together; None: it was not computed."""
    strategies: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int


def _summarised(result: Result) -> dict[str, Any]:
    kept = {name: getattr(result, name) for name in SUMMARISED}
    return kept | {"loadgen_bottleneck": result.loadgen.bottleneck if result.loadgen else ()}


def _drawn(file: Path, results: Sequence[Result], title: str, ceiling: float | None) -> bool:
    """Draw the picture, if the extra `plot` is installed. Returns whether it is."""
    try:
        plot_comparison(file, results, title, ceiling)
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        return False
    return True


def report(
    results: Sequence[Result], out: Path, console: Console, title: str, ceiling: float | None = None
) -> Comparison:
    """Write the summary and the picture to the folder `out`, beside the results, and print the table."""
    comparison = Comparison(
        winner=winner(results).strategy,
        why=why(results),
        ceiling_hit_rate=ceiling,
        strategies={r.strategy: _summarised(r) for r in results},
        config=results[0].config,
        versions=results[0].versions,
        seed=results[0].seed,
    )
    write_json(out / SUMMARY_FILE, comparison)
    picture = _drawn(out / PLOT_FILE, results, title, ceiling)
    print_comparison(console, results, ceiling)
    console.print(f"written to {out}: results_*.json, {SUMMARY_FILE}{f', {PLOT_FILE}' if picture else ''}")
    if not picture:
        console.print("no picture: matplotlib is not installed (pip install 'kvcluster[plot]')", markup=False)
    return comparison


def title_of(results: Sequence[Result]) -> str:
    """Heading of the picture: what was run, and on how many workers."""
    first = results[0]
    how = "simulated" if first.config.get("mode") == "simulated" else f"speed {first.config.get('speed', 1):g}"
    return f"{first.config.get('workload')}: {first.requests:,} requests, {len(first.workers)} workers ({how})"


def keep(result: Result, out: Path, console: Console) -> None:
    """Write the result of one strategy as soon as there is one, so that a later failure loses nothing, and print it."""
    write_json(out / f"results_{result.strategy}.json", result)
    p50 = result.ttft_seconds.p50 if result.ttft_seconds else None
    console.print(
        f"{result.strategy}: {result.requests:,} requests, {result.errors:,} errors, "
        f"hit rate {percent(result.hit_rate)}, TTFT p50 {seconds(p50)}"
    )


def raw_file(raw: Path, strategy: str) -> Path:
    """`runs.jsonl` becomes `runs_<strategy>.jsonl`."""
    return raw.with_name(f"{raw.stem}_{strategy}{raw.suffix}")


def keep_raw(raw: Path | None, strategy: str, records: Sequence[Record]) -> None:
    """Write the records of one strategy, if `--raw` names a file."""
    if raw is not None:
        write_records(raw_file(raw, strategy), records)


async def compare(
    launch: Launch,
    strategies: Sequence[str],
    options: BenchOptions,
    out: Path,
    console: Console,
    ceiling: Callable[[Workload], float] | None = None,
) -> Comparison:
    """Run each strategy in turn on a cold cluster, and report. `ceiling` computes the hit rate that no router can beat
    by much.

    Raises what `launch` raises, `WorkloadError` and `EndpointError`.
    """
    workload = build_workload(options.workload)
    results = []
    for strategy in strategies:
        async with launch(strategy) as target:
            result, driven = await measure(
                target.url, workload, options, console, strategy=strategy, worker_ids=target.worker_ids
            )
        keep_raw(options.raw, strategy, driven.records)
        keep(result, out, console)
        results.append(result)
    return report(results, out, console, title_of(results), ceiling(workload) if ceiling is not None else None)
