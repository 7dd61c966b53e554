"""`kvcluster bench` and `compare`: measurements of running endpoints."""

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
from bench.simulation.errors import refusal
from bench.workloads import Arrivals, Process, Sharing, Workload, WorkloadSpec
from controller.api.load import load_manifest, override
from controller.api.model import KVCluster
from controller.api.routing import Strategy
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.desired_processes import check
from kvcache.ranks import rank_id
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.terminal import exits, output
from kvcluster.options import LoadOptions

READY_TIMEOUT = 120.0
"""Most seconds that a cluster may take to become ready."""


class NoStrategyError(ValueError):
    """`--strategies` is empty."""


def workload_spec(load: LoadOptions, context: int | None = None) -> WorkloadSpec:
    """The workload asked for; `context` tokens is the longest request that the workers take, if that is known.

    Raises `ValueError` for an arrival process that there is not.
    """
    if load.arrivals is not None and load.arrivals not in set(Process):
        raise ValueError(f"--arrivals must be one of {', '.join(Process)}, not {load.arrivals!r}")
    if load.cv is not None and load.arrivals is None:
        raise ValueError("--cv is that of gamma arrivals: add --arrivals gamma")
    return WorkloadSpec(
        name=load.workload or ("rag" if load.trace is None else "trace"),
        seed=load.seed,
        limit=load.limit,
        rate=load.rate,
        trace=load.trace,
        context=load.context or context,
        api=load.api,
        arrivals=None if load.arrivals is None else Arrivals(Process(load.arrivals), load.cv),
        time_scale=load.time_scale,
        format=load.format,
        sharing=Sharing(load.shared_prefix, load.prefixes, load.share_sessions),
    )


def with_strategy(manifest: KVCluster, strategy: str) -> KVCluster:
    """The manifest with another strategy. Raises `ManifestError`."""
    return override(manifest, {("spec", "router", "strategy"): strategy}, f"{manifest.name} with --strategies")


def checked_strategies(manifest: KVCluster, given: Sequence[str]) -> list[str]:
    """The strategies that are named, each once and each valid. Raises `NoStrategyError` or `ManifestError`."""
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise NoStrategyError(f"--strategies names no strategy; use some of: {', '.join(Strategy)}")
    for name in names:
        with_strategy(manifest, name)
    return names


@exits(OSError)
def bench(
    url: str, load: LoadOptions, *, speed: float, model: str | None, timeout: float, json: Path | None, raw: Path | None
) -> None:
    """Sends a workload to an endpoint, and measures."""
    options = BenchOptions(workload=workload_spec(load), speed=speed, model=model, timeout=timeout, json=json, raw=raw)
    uvloop.run(run_bench(url, options, output()))


def launcher(manifest: KVCluster, log_dir: Path) -> Launch:
    """A function that starts the manifest anew for a strategy, which logs to a folder of its own."""

    @asynccontextmanager
    async def launch(strategy: str) -> AsyncIterator[Target]:
        async with LocalCluster(with_strategy(manifest, strategy), Options(log_dir=log_dir / strategy)) as cluster:
            await cluster.wait_ready(READY_TIMEOUT)
            ranks = manifest.spec.engine.data_parallel.size
            yield Target(
                url=cluster.url,
                worker_ids=tuple(
                    rank_id(worker.name, rank, ranks) for worker in cluster.workers for rank in range(ranks)
                ),
            )

    return launch


def pooled_ceiling(manifest: KVCluster) -> Callable[[Workload], float]:
    """A function that gives the hit rate of a single cache as large as those of all the manifest's workers together."""

    def ceiling(workload: Workload) -> float:
        spec = manifest.spec
        longest = spec.max_model_len
        asked = (
            prompt
            for prompt in prompts(workload, load_tokenizer(spec.tokenizer))
            if refusal(len(prompt.tokens), prompt.request.max_tokens, longest, streaming=True) is None
        )
        caches = spec.workers.replicas * spec.engine.data_parallel.size
        return pooled_hit_rate(asked, caches * (spec.blocks + spec.cpu_blocks), spec.cache.block_size)

    return ceiling


@exits(StartError, OSError)
def compare(
    file: str,
    strategies: Sequence[str],
    load: LoadOptions,
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
        workload=workload_spec(load, manifest.spec.max_model_len),
        speed=manifest.spec.engine.speed,
        model=manifest.spec.model_name,
        timeout=timeout,
        block_size=manifest.spec.cache.block_size,
        raw=raw,
    )
    launch, ceiling = launcher(manifest, out / "logs"), pooled_ceiling(manifest)
    uvloop.run(run_comparison(launch, names, options, out, output(), ceiling))
