"""`kvcluster bench` and `compare`: measurements of running endpoints."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import uvloop
from rich.console import Console

from bench.compare import Launch, Target, cluster_play
from bench.comparison import Folder, file_name
from bench.experiment import ExperimentOptions, conduct
from bench.foreign import RouterCommand, RouterStartError, running, worker_tallies
from bench.prompts import pooled_hit_rate, prompts
from bench.result import WorkerTally, write_json
from bench.run import LiveOptions, endpoint_play
from bench.simulation.errors import refusal
from bench.workloads import Workload
from controller.api.load import load_manifest, override
from controller.api.model import KVCluster
from controller.api.routing import Strategy
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.desired_processes import check, desired_workers
from controller.local.secrets import Secrets, with_secrets
from kvcache.ranks import rank_id
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.experiment import experiment_options, origin, workload_spec
from kvcluster.options import EndpointOptions, LoadOptions, MeasureOptions, tls_context
from kvcluster.terminal import exits, output, writing

READY_TIMEOUT = 120.0
"""Most seconds that a cluster may take to become ready."""


class NoStrategyError(ValueError):
    """`--strategies` is empty, and there is no other router."""


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


def checked_routers(given: Sequence[str]) -> dict[str, RouterCommand]:
    """The other routers by name. Raises `RouterCommandError`, and `ValueError` for a name that is taken."""
    routers: dict[str, RouterCommand] = {}
    for text in given:
        router = RouterCommand.parse(text)
        taken = {file_name(name) for name in (*routers, *Strategy)}
        if file_name(router.name) in taken:
            raise ValueError(f"--router {router.name}: a strategy or another router has this name, or one like it")
        routers[router.name] = router
    return routers


@exits(OSError)
def bench(
    url: str,
    load: LoadOptions,
    measured: MeasureOptions,
    endpoint: EndpointOptions,
    *,
    speed: float,
    model: str | None,
    timeout: float,
    as_json: bool,
    result: Path | None,
    out: Path | None,
) -> None:
    """Sends a workload to an endpoint, and measures."""
    experiment = experiment_options(workload_spec(load), measured)
    experiment.check()  # what is wrong with it is said before anything is sent
    console = Console(stderr=True) if as_json else output()
    options = LiveOptions(
        speed=speed, model=model, timeout=timeout, headers=endpoint.headers(), tls=tls_context(endpoint.ca)
    )
    play = endpoint_play(url, options, console)
    repeated = experiment.repeats > 1
    folder = Folder(console, out, measured.raw, repeated=repeated, several=False)
    outcomes = uvloop.run(conduct(play, ["endpoint"], experiment, folder.keep))
    # The strategy is known from the headers of the answers.
    named = [replace(outcome, contender=outcome.results[0].strategy) for outcome in outcomes]
    if result is not None:
        write_json(result, named[0].results[0])
    folder.publish(named, origin(load))
    if as_json:
        with writing():
            for each in named[0].results:
                sys.stdout.write(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE).decode())


def launcher(manifest: KVCluster, routers: dict[str, RouterCommand], log_dir: Path) -> Launch:
    """A function that starts the manifest anew for a contender, which logs to a folder of its own: with a strategy, or
    its workers alone behind another router."""

    @asynccontextmanager
    async def launch(contender: str) -> AsyncIterator[Target]:
        logs = log_dir / file_name(contender)
        router = routers.get(contender)
        async with AsyncExitStack() as stack:
            if router is None:
                yield await _own(stack, with_strategy(manifest, contender), logs)
            else:
                yield await _foreign(stack, manifest, router, logs)

    return launch


async def _own(stack: AsyncExitStack, manifest: KVCluster, logs: Path) -> Target:
    cluster = await stack.enter_async_context(LocalCluster(manifest, Options(log_dir=logs)))
    await cluster.wait_ready(READY_TIMEOUT)
    ranks = manifest.spec.engine.data_parallel.size
    ids = (rank_id(worker.name, rank, ranks) for worker in cluster.workers for rank in range(ranks))
    return Target(url=cluster.url, worker_ids=tuple(ids))


async def _foreign(stack: AsyncExitStack, manifest: KVCluster, router: RouterCommand, logs: Path) -> Target:
    cluster = await stack.enter_async_context(LocalCluster(manifest, Options(log_dir=logs), desired=desired_workers))
    await cluster.wait_ready(READY_TIMEOUT)
    workers = {worker.name: worker.url for worker in cluster.workers}
    log = logs / f"{file_name(router.name)}.log"
    url = await stack.enter_async_context(running(router, list(workers.values()), manifest.spec.model_name, log))

    async def tallies() -> dict[str, WorkerTally]:
        return await worker_tallies(workers)

    return Target(url=url, tallies=tallies, config={"router": router.template})


def pooled_ceiling(manifest: KVCluster, experiment: ExperimentOptions) -> Callable[[Workload], float]:
    """A function that gives the hit rate of a single cache as large as those of all the manifest's workers together."""

    def ceiling(workload: Workload) -> float:
        spec = manifest.spec
        longest = spec.max_model_len
        asked = (
            prompt
            for prompt in prompts(workload, load_tokenizer(spec.tokenizer))
            if refusal(len(prompt.tokens), prompt.request.max_tokens, longest) is None
        )
        caches = spec.workers.replicas * spec.engine.data_parallel.size
        return pooled_hit_rate(
            asked, caches * (spec.blocks + spec.cpu_blocks), spec.cache.block_size, experiment.counts
        )

    return ceiling


@exits(StartError, RouterStartError, OSError)
def compare(
    file: str,
    strategies: Sequence[str],
    router: Sequence[str],
    load: LoadOptions,
    measured: MeasureOptions,
    endpoint: EndpointOptions,
    *,
    speed: float | None,
    timeout: float,
    out: Path,
    secrets: Path | None = None,
) -> None:
    """Runs a manifest once per strategy and other router, and compares."""
    manifest = load_manifest(file)
    if speed is not None:
        manifest = override(manifest, {("spec", "engine", "speed"): speed}, f"{file} with --speed")
    check(manifest)
    manifest = with_secrets(manifest, Secrets(secrets))
    routers = checked_routers(router)
    named = any(name.strip() for name in strategies)
    names = checked_strategies(manifest, strategies) if named or not routers else []
    experiment = experiment_options(workload_spec(load, manifest.spec.max_model_len), measured)
    options = LiveOptions(
        speed=manifest.spec.engine.speed,
        model=manifest.spec.model_name,
        timeout=timeout,
        block_size=manifest.spec.cache.block_size,
        headers=endpoint.headers(),
        tls=tls_context(endpoint.ca),
    )
    experiment.check()  # what is wrong with it is said before anything starts
    console = output()
    play = cluster_play(launcher(manifest, routers, out / "logs"), options, experiment.measurement.warm_up, console)
    folder = Folder(console, out, measured.raw, repeated=experiment.repeats > 1)
    outcomes = uvloop.run(conduct(play, [*names, *routers], experiment, folder.keep))
    commands = {name: command.template for name, command in routers.items()}
    folder.publish(outcomes, origin(load, manifest, commands), experiment.ceiling(pooled_ceiling(manifest, experiment)))
