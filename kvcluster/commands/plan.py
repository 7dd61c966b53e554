"""`kvcluster plan`: how many workers a workload needs, of which profile, and at what cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import orjson
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.planning.plan import Planner, make_plan
from bench.planning.report import as_json, plot_plan, print_plan
from bench.planning.trial import Target
from bench.plot import drawn
from bench.result import versions, write_json
from bench.simulation import Delays, Scenario
from bench.simulation.play import Play
from bench.simulation.processes import Processes
from bench.simulation.scenario import Routers
from bench.slo import parse_duration
from bench.workloads import build_workload
from controller.api.load import load_manifest
from kvcluster.commands.experiment import workload_spec
from kvcluster.commands.simulate import flow_of, shape_of
from kvcluster.options import LoadOptions
from kvcluster.terminal import exits, output, writing


class TargetNotMetError(Exception):
    """No number of workers meets the target."""


def parse_prices(given: Sequence[str], profiles: Sequence[str]) -> dict[str, float]:
    """US dollars for an hour of one worker, by profile, of texts like `llama-2-13b-a100-40gb=2.2`, or `2.2` for all.
    Raises `ValueError`."""
    prices: dict[str, float] = {}
    for text in given:
        name, equals, amount = text.rpartition("=")
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if not 0 <= price < float("inf") or (equals and name not in profiles):
            known = ", ".join(profiles)
            raise ValueError(f"--price {text!r}: write PROFILE=DOLLARS, an hour of a worker, with one of: {known}")
        prices.update({name: price} if equals else dict.fromkeys(profiles, price))
    return prices


@exits(OSError, TargetNotMetError)
def plan(
    file: str,
    load: LoadOptions,
    delays: Delays,
    *,
    ttft_p95: str | None,
    tpot_p95: str | None,
    profiles: Sequence[str],
    prices: Sequence[str],
    most: int,
    jobs: int | None,
    out: Path,
    as_json_only: bool,
) -> None:
    """Simulates the manifest's cluster with more and fewer workers, and says how many meet the bounds."""
    spec = load_manifest(file).spec
    shape, own = shape_of(spec), spec.profile.name
    names = list(dict.fromkeys(profiles)) or [own]
    target = Target(
        None if ttft_p95 is None else parse_duration(ttft_p95), None if tpot_p95 is None else parse_duration(tpot_p95)
    )
    play = Play(
        shape,
        str(spec.router.strategy),
        workload_spec(load, shape.engine.max_model_len),
        delays,
        Scenario(routers=Routers.model_validate({"count": max(spec.router.replicas, 1), "dealing": "random"})),
        flow=flow_of(spec.router.flow_control),
    )
    console = output()
    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f} clusters simulated"), TimeElapsedColumn())
    shown = console.is_terminal and not as_json_only
    with Processes(jobs) as processes, Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=None)
        planner = Planner(play, target, processes, most, lambda tried: bar.advance(task, tried))
        made = make_plan(planner, names, parse_prices(prices, names), own)
    fields = {**as_json(made), "config": play.config(build_workload(play.workload)), "versions": versions({})}
    write_json(out / "plan.json", fields)
    if as_json_only:
        with writing():
            sys.stdout.write(orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    else:
        print_plan(console, made)
    pictures = ""
    if any(each.trials for each in made.profiles):
        for name in ("plan.png", "plan.svg"):
            if drawn(partial(plot_plan, out / name, made), console):
                pictures += f", {name}"
    if not as_json_only:
        console.print(f"written to {out}: plan.json{pictures}")
    if made.best is None:
        raise TargetNotMetError(f"no profile of {', '.join(names)} meets {target} with at most {most} workers")
