"""The same workload under one strategy after another, each on a cold cluster, which is live or simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.plot import plot_comparison
from bench.prompts import pooled_hit_rate, prompts
from bench.record import Record, write_records
from bench.report import percent, print_comparison, seconds, why, winner
from bench.result import Result, RunInfo, summarise, write_json
from bench.run import BenchOptions, measure, progress_bar
from bench.simulation import ClusterShape, Delays, Simulation
from bench.workloads import Workload, WorkloadSpec, build_workload
from kvcache.tokens.tokenizer import load_tokenizer

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


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `kvcluster simulate` takes."""

    workload: WorkloadSpec
    delays: Delays = field(default_factory=Delays)
    raw: Path | None = None
    """Where the records go: one file for each strategy, one line for each request."""


WITHOUT_TIER = "_no_cpu"
"""Ending of a strategy's name in results without the CPU cache that the workers have in the others."""


def _plays(shape: ClusterShape, strategies: Sequence[str]) -> list[tuple[str, ClusterShape]]:
    """What to play: each strategy by name, with the workers it is played with."""
    if not shape.engine.cpu_blocks:
        return [(strategy, shape) for strategy in strategies]
    without = replace(shape, engine=replace(shape.engine, cpu_blocks=0))
    return [play for strategy in strategies for play in ((strategy, shape), (strategy + WITHOUT_TIER, without))]


def compare_simulated(
    shape: ClusterShape, strategies: Sequence[str], options: SimulateOptions, out: Path, console: Console
) -> Comparison:
    """Play the workload under each strategy on a cold cluster in virtual time, and report. If the workers have a CPU
    cache, each is played without it, too.

    Raises `WorkloadError`, `PromptError`, and what the engine says of a request that it cannot run.
    """
    workload = build_workload(options.workload)
    tokenizer = load_tokenizer(shape.tokenizer)
    results = []
    for strategy, played in _plays(shape, strategies):
        simulation = Simulation(played, strategy.removesuffix(WITHOUT_TIER), options.delays)
        with progress_bar(console, strategy, workload.count) as progress:
            records = simulation.run(prompts(workload, tokenizer), progress)
        keep_raw(options.raw, strategy, records)
        config = {
            "mode": "simulated",
            "workload": workload.name,
            "model": shape.model,
            "workers": shape.workers,
            **({"ranks": shape.ranks} if shape.ranks > 1 else {}),
            "blocks": played.engine.blocks,
            **({"cpu_blocks": played.engine.cpu_blocks} if played.engine.cpu_blocks else {}),
            "network_delay": options.delays.network,
            "feed_delay": options.delays.feed,
            "seconds": "virtual",
            **workload.config,
        }
        info = RunInfo(strategy, workload.seed, config, shape.engine.block_size, simulation.worker_ids)
        results.append(summarise(records, info))
        keep(results[-1], out, console)
    ceiling = pooled_hit_rate(prompts(workload, tokenizer), shape.capacity, shape.engine.block_size)
    return report(results, out, console, title_of(results), ceiling)
