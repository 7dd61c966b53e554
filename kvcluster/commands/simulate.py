"""`kvcluster simulate` and `predict`: a manifest's cluster in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.plot import drawn
from bench.predict import agreement, overhead, print_agreement, print_overhead, replay
from bench.record import read_records
from bench.simulation import ClusterShape, Delays, Scenario, read_scenario
from bench.simulation.comparison import SimulateOptions, compare_simulated
from bench.simulation.play import Play, asked
from bench.simulation.sweep import grid, parse_axes, plot_sweep, print_sweep, run_sweep, write_sweep
from bench.workloads import build_workload
from controller.api.flow_control import FlowControl
from controller.api.load import load_manifest
from controller.api.model import KVClusterSpec
from controller.process_settings import lora_settings
from kvcluster.commands.experiment import experiment_options, origin, workload_spec
from kvcluster.commands.measure import checked_strategies
from kvcluster.options import LoadOptions, MeasureOptions
from kvcluster.terminal import exits, output
from router.core.flow import FlowClass, FlowPolicy
from worker.emulator.engine.config import EngineConfig


class NothingToSimulateError(ValueError):
    """The manifest asks for no workers."""


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


def flow_of(flow: FlowControl, *, enabled: bool | None = None) -> FlowPolicy | None:
    """Flow control of a manifest's routers, as the routers themselves read it; None: there is none. `enabled` overrules
    the manifest."""
    if not (flow.enabled if enabled is None else enabled):
        return None
    given: dict[str, Any] = {
        "classes": tuple(
            FlowClass(each.name, each.priority, each.ttl_seconds, each.max_mib * 2**20) for each in flow.classes
        ),
        "max_bytes": flow.max_mib * 2**20 if flow.max_mib is not None else None,
        "max_requests": flow.max_requests,
        "queue_limit": flow.queue_seconds,
        "quantum": flow.quantum_tokens,
        "overtaken": flow.overtaken_seconds,
    }
    return FlowPolicy(**{name: value for name, value in given.items() if value not in (None, ())})


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of simulations; yields a function that takes how many have been played."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


@exits(OSError)
def simulate(
    file: str,
    strategies: Sequence[str],
    load: LoadOptions,
    measured: MeasureOptions,
    delays: Delays,
    *,
    cpu_blocks: int | None,
    scenario: Path | None,
    flow_control: bool | None,
    sweep: Sequence[str],
    jobs: int | None,
    out: Path,
) -> None:
    """Compares strategies in virtual time; with `cpu_blocks`, each with a CPU cache of that size in every worker, and
    without one. With `sweep`, one simulation for each combination of its values."""
    manifest = load_manifest(file)
    names = checked_strategies(manifest, strategies)
    shape = shape_of(manifest.spec)
    if cpu_blocks is not None:
        shape = replace(shape, engine=replace(shape.engine, cpu_blocks=cpu_blocks))
    played = Scenario() if scenario is None else read_scenario(scenario)
    if not shape.workers:
        raise NothingToSimulateError("spec.workers.replicas: 0 leaves nothing to simulate; set it to 1 or more")
    workload = workload_spec(load, shape.engine.max_model_len)
    flow = flow_of(manifest.spec.router.flow_control, enabled=flow_control)
    console = output()
    if not sweep:
        experiment = experiment_options(workload, measured)
        options = SimulateOptions(experiment, delays, played, flow, measured.raw)
        compare_simulated(shape, names, options, out, console, origin(load, manifest))
        return
    if measured != MeasureOptions():
        raise ValueError("--sweep plays each combination once, whole: leave the options about measurement out")
    axes = parse_axes(sweep)
    if "strategy" not in axes and len(names) > 1:
        axes = {"strategy": list(names), **axes}
    if "flowControl" in axes:
        flow = flow_of(manifest.spec.router.flow_control, enabled=True)
    play = Play(shape, names[0], workload, delays, played, flow=flow)
    with bar(console, "simulations", len(grid(axes))) as done:
        points = run_sweep(play, axes, jobs, done)
    write_sweep(points, out)
    print_sweep(console, points)
    title = f"{workload.name}: {points[0].result.requests:,} requests (simulated)"
    picture = drawn(lambda: plot_sweep(out / "sweep.png", points, title), console)
    console.print(f"written to {out}: sweep.json, sweep.csv{', sweep.png' if picture else ''}")


@exits(OSError)
def predict(file: str, raw: Path, load: LoadOptions) -> None:
    """Compares the times to first token in the records `raw` with those that the latency model predicts."""
    shape = shape_of(load_manifest(file).spec)
    prompts = asked(build_workload(workload_spec(load, shape.engine.max_model_len)), shape)
    records = read_records(raw)
    modelled = replay(records, prompts, shape)
    print_agreement(output(), agreement(modelled))
    print_overhead(output(), overhead(modelled, records))
