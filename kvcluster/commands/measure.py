"""`kvcluster bench` and `kvcluster compare`: measurements of a running endpoint, or of local clusters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from bench.compare import Launch, Target
from bench.compare import compare as run_comparison
from bench.prompts import pooled_hit_rate, prompts
from bench.run import BenchOptions
from bench.run import run as run_bench
from bench.workloads import Workload
from controller.api.load import load_manifest, override
from controller.api.model import KVCluster
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.desired_processes import check
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.terminal import exits, output
from kvcluster.commands.workload import Load, checked_strategies, with_strategy

READY_TIMEOUT = 120.0


@exits(OSError)
def bench(
    url: str, load: Load, *, speed: float, model: str | None, timeout: float, json: Path | None, raw: Path | None
) -> None:
    """Sends a workload to an endpoint, and measures."""
    options = BenchOptions(load.spec(), speed=speed, model=model, timeout=timeout, json=json, raw=raw)
    uvloop.run(run_bench(url, options, output()))


def launcher(manifest: KVCluster, log_dir: Path) -> Launch:
    """A function that starts the manifest anew for a strategy, which logs to a folder of its own."""

    @asynccontextmanager
    async def launch(strategy: str) -> AsyncIterator[Target]:
        async with LocalCluster(with_strategy(manifest, strategy), Options(log_dir=log_dir / strategy)) as cluster:
            await cluster.wait_ready(READY_TIMEOUT)
            yield Target(
                url=cluster.url,
                worker_ids=tuple(worker.name for worker in cluster.workers),
            )

    return launch


def pooled_ceiling(manifest: KVCluster) -> Callable[[Workload], float]:
    """A function that gives the hit rate of a single cache as large as those of all the manifest's workers together."""

    def ceiling(workload: Workload) -> float:
        spec = manifest.spec
        asked = prompts(workload, load_tokenizer(spec.tokenizer))
        return pooled_hit_rate(asked, spec.workers.replicas * spec.blocks, spec.cache.block_size)

    return ceiling


@exits(StartError, OSError)
def compare(
    file: str,
    strategies: Sequence[str],
    load: Load,
    *,
    speed: float | None,
    timeout: float,
    out: Path,
    raw: Path | None,
) -> None:
    """Runs a manifest once per strategy, and compares."""
    manifest = load_manifest(file)
    if speed is not None:
        manifest = override(manifest, {("spec", "engine", "speed"): speed}, f"{file} with --speed")
    check(manifest)
    names = checked_strategies(manifest, strategies)
    options = BenchOptions(
        load.spec(),
        speed=manifest.spec.engine.speed,
        model=manifest.spec.model_name,
        timeout=timeout,
        block_size=manifest.spec.cache.block_size,
        raw=raw,
    )
    launch, ceiling = launcher(manifest, out / "logs"), pooled_ceiling(manifest)
    uvloop.run(run_comparison(launch, names, options, out, output(), ceiling))
