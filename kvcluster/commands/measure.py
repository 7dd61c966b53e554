"""`kvcluster bench`, `compare`, `simulate` and `predict`: measurements of running endpoints and in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from bench.compare import Launch, SimulateOptions, Target, compare_simulated
from bench.compare import compare as run_comparison
from bench.predict import agreement, print_agreement, replay
from bench.prompts import pooled_hit_rate, prompts
from bench.record import read_records
from bench.run import BenchOptions
from bench.run import run as run_bench
from bench.simulation import ClusterShape, Delays
from bench.workloads import Arrivals, Process, Sharing, Workload, WorkloadSpec, build_workload
from controller.api.load import load_manifest, override
from controller.api.model import KVCluster, KVClusterSpec
from controller.api.routing import Strategy
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.desired_processes import check
from controller.process_settings import lora_settings
from kvcache.ranks import rank_id
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.terminal import exits, output
from kvcluster.options import LoadOptions
from worker.emulator.engine.config import EngineConfig

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
        asked = prompts(workload, load_tokenizer(spec.tokenizer))
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


def shape_of(spec: KVClusterSpec) -> ClusterShape:
    """The workers of a manifest as the emulator runs them. Its speed does not matter in virtual time."""
    profile = spec.profile
    return ClusterShape(
        workers=spec.workers.replicas,
        ranks=spec.engine.data_parallel.size,
        engine=EngineConfig(
            blocks=spec.blocks,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_num_seqs=profile.max_num_seqs,
            max_model_len=spec.max_model_len,
            block_size=spec.cache.block_size,
            max_loras=int(str(lora_settings(spec).get("max-loras", 0))),
            cpu_blocks=spec.cpu_blocks,
            cpu_block_seconds=profile.load_seconds(spec.cache.block_size, spec.cpu_bandwidth),
            sliding_window=profile.geometry.sliding_window,
            sliding_groups=profile.geometry.sliding_groups,
        ),
        latency=profile.latency,
        model=spec.model_name,
        tokenizer=spec.tokenizer,
    )


class NothingToSimulateError(ValueError):
    """The manifest asks for no workers."""


@exits(OSError)
def simulate(
    file: str,
    strategies: Sequence[str],
    load: LoadOptions,
    delays: Delays,
    *,
    cpu_blocks: int | None,
    out: Path,
    raw: Path | None,
) -> None:
    """Compares strategies in virtual time; with `cpu_blocks`, each with a CPU cache of that size in every worker, and
    without one."""
    manifest = load_manifest(file)
    names = checked_strategies(manifest, strategies)
    shape = shape_of(manifest.spec)
    if cpu_blocks is not None:
        shape = replace(shape, engine=replace(shape.engine, cpu_blocks=cpu_blocks))
    if not shape.workers:
        raise NothingToSimulateError("spec.workers.replicas: 0 leaves nothing to simulate; set it to 1 or more")
    compare_simulated(
        shape, names, SimulateOptions(workload_spec(load, shape.engine.max_model_len), delays, raw), out, output()
    )


@exits(OSError)
def predict(file: str, raw: Path, load: LoadOptions) -> None:
    """Compares the times to first token in the records `raw` with those that the latency model predicts."""
    shape = shape_of(load_manifest(file).spec)
    asked = prompts(build_workload(workload_spec(load, shape.engine.max_model_len)), load_tokenizer(shape.tokenizer))
    print_agreement(output(), agreement(replay(read_records(raw), asked, shape)))
