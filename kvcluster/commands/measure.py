"""`kvcluster bench` and `kvcluster compare`: bench measures, and local mode supplies what is measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.compare import Launch, Target
from bench.compare import compare as run_comparison
from bench.loadgen import EndpointError
from bench.run import BenchOptions
from bench.run import run as run_bench
from bench.workloads import WorkloadError, WorkloadSpec
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.plan import LocalModeError, check
from controller.spec.load import load_manifest, override
from controller.spec.model import KVCluster, Strategy
from controller.spec.problems import ManifestError
from kvcluster.commands.errors import BAD_INPUT, FAILED, complain

READY_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """What `bench` and `compare` drive with; None means the workload's own default."""

    workload: str
    trace: Path | None
    limit: int | None
    rate: float | None
    seed: int
    timeout: float
    raw: Path | None

    def spec(self) -> WorkloadSpec:
        """The workload asked for."""
        return WorkloadSpec(self.workload, self.seed, self.limit, self.rate, self.trace)


def bench(url: str, load: Load, *, speed: float, model: str | None, json: Path | None) -> int:
    """Runs the command; returns its exit code."""
    try:
        options = BenchOptions(load.spec(), speed=speed, model=model, timeout=load.timeout, json=json, raw=load.raw)
        asyncio.run(run_bench(url, options, Console()))
    except (ValueError, WorkloadError) as error:
        complain(error)
        return BAD_INPUT
    except (EndpointError, OSError) as error:
        complain(error)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return 0


def with_strategy(manifest: KVCluster, strategy: str) -> KVCluster:
    """The manifest under another strategy. Raises `ManifestError`."""
    return override(manifest, {("spec", "router", "strategy"): strategy}, f"{manifest.name} with --strategies")


def launcher(manifest: KVCluster, log_dir: Path) -> Launch:
    """Starts the manifest afresh for each strategy; logs go to one folder a strategy."""

    @asynccontextmanager
    async def launch(strategy: str) -> AsyncIterator[Target]:
        async with LocalCluster(with_strategy(manifest, strategy), Options(log_dir=log_dir / strategy)) as cluster:
            await cluster.wait_ready(READY_TIMEOUT)
            yield Target(
                url=cluster.url,
                management_url=cluster.management_url,
                worker_urls=tuple(worker.url for worker in cluster.workers),
                worker_ids=tuple(worker.name for worker in cluster.workers),
            )

    return launch


def compare(file: str, strategies: Sequence[str], load: Load, *, speed: float | None, out: Path) -> int:
    """Runs the command; returns its exit code."""
    names = list(dict.fromkeys(name.strip() for name in strategies if name.strip()))
    try:
        if not names:
            complain(f"--strategies names no strategy; use some of: {', '.join(Strategy)}")
            return BAD_INPUT
        manifest = load_manifest(file)
        if speed is not None:
            manifest = override(manifest, {("spec", "engine", "speed"): speed}, f"{file} with --speed")
        check(manifest)
        # Before the first of several runs, not after it.
        for name in names:
            with_strategy(manifest, name)
        options = BenchOptions(
            load.spec(),
            speed=manifest.spec.engine.speed,
            model=manifest.spec.model_name,
            timeout=load.timeout,
            block_size=manifest.spec.cache.block_size,
            raw=load.raw,
        )
        asyncio.run(run_comparison(launcher(manifest, out / "logs"), names, options, out, Console()))
    except (ManifestError, LocalModeError, WorkloadError, ValueError) as error:
        complain(error)
        return BAD_INPUT
    except (StartError, EndpointError, OSError) as error:
        complain(error)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return 0
