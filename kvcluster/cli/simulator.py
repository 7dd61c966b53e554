"""Commands in virtual time: their arguments and options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.apps import Manifest, app
from kvcluster.cli.laboratory import Out, Strategies
from kvcluster.options import LoadOptions, MeasureOptions, takes

NetworkDelay = Annotated[
    float,
    typer.Option(
        min=0, metavar="SECONDS", help="From router to worker, one way; what processes add can be counted in."
    ),
]
FeedDelay = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="From a change of a cache to the router's view of it.")
]
TokenDelay = Annotated[
    float,
    typer.Option(
        min=0, metavar="SECONDS", help="From router to worker for each token of the prompt; `predict` measures it."
    ),
]
ScenarioFile = Annotated[
    Path | None,
    typer.Option("--scenario", metavar="FILE", help="Routers, failures and scaling during the run, as YAML."),
]
Jobs = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes that simulate at a time; default: one for each core.")
]


@app.command()
@takes("load", LoadOptions)
@takes("measured", MeasureOptions)
def simulate(
    manifest: Manifest,
    load: LoadOptions,
    measured: MeasureOptions,
    strategies: Strategies = "cache_aware,round_robin,least_loaded,longest_prefix",
    network_delay: NetworkDelay = 0.001,
    feed_delay: FeedDelay = 0.001,
    token_delay: TokenDelay = 0.0,
    cpu_blocks: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="BLOCKS",
            help="Blocks of each worker's CPU cache. Default: what spec.engine.cpuCache holds. With a CPU cache, each "
            "strategy is played a second time without it.",
        ),
    ] = None,
    scenario: ScenarioFile = None,
    flow_control: Annotated[
        bool | None,
        typer.Option(
            "--flow-control/--no-flow-control",
            help="Whether requests wait in the routers while all workers are busy. Default: as "
            "spec.router.flowControl says.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="Play every combination of these values; repeat for several parameters: workers, strategy, rate, "
            "seed, limit, profile, blocks, cpuBlocks, routers, networkDelay, feedDelay, flowControl (on, off).",
        ),
    ] = None,
    jobs: Jobs = None,
    out: Out = Path("results"),
) -> None:
    """Compare strategies in virtual time: the same engine and router code, no processes, no waiting."""
    from bench.simulation import Delays
    from kvcluster.commands.simulate import simulate

    raise typer.Exit(
        simulate(
            manifest,
            strategies.split(","),
            load,
            measured,
            Delays(network_delay, feed_delay, token_delay),
            cpu_blocks=cpu_blocks,
            scenario=scenario,
            flow_control=flow_control,
            sweep=sweep or (),
            jobs=jobs,
            out=out,
        )
    )


@app.command()
@takes("load", LoadOptions)
def predict(
    manifest: Manifest,
    records: Annotated[Path, typer.Argument(metavar="RAW", help="What `bench --raw` or `compare --raw` wrote.")],
    load: LoadOptions,
) -> None:
    """Compare the time to first token of a finished run with what the latency model predicts for it."""
    from kvcluster.commands.simulate import predict

    raise typer.Exit(predict(manifest, records, load))


@app.command()
@takes("load", LoadOptions)
def plan(
    manifest: Manifest,
    load: LoadOptions,
    ttft_p95: Annotated[
        str | None, typer.Option("--ttft-p95", metavar="TIME", help="Bound of the time to first token, say 500ms.")
    ] = None,
    tpot_p95: Annotated[
        str | None, typer.Option("--tpot-p95", metavar="TIME", help="Bound of the time per output token, say 50ms.")
    ] = None,
    profiles: Annotated[
        str, typer.Option(metavar="A,B,...", help="Profiles to plan for; default: the manifest's.")
    ] = "",
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="PROFILE=USD", help="Price of an hour of one worker; repeat, or give one number for all."),
    ] = None,
    max_workers: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Largest cluster to consider.")] = 64,
    network_delay: NetworkDelay = 0.001,
    feed_delay: FeedDelay = 0.001,
    token_delay: TokenDelay = 0.0,
    jobs: Jobs = None,
    out: Out = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Find out how many workers a workload needs, of which profile, and at what cost, by simulation.

    Exit code 0: there is a plan; 1: the bounds cannot be met, and it says why; 2: the input is wrong.
    """
    from bench.simulation import Delays
    from kvcluster.commands.plan import plan

    raise typer.Exit(
        plan(
            manifest,
            load,
            Delays(network_delay, feed_delay, token_delay),
            ttft_p95=ttft_p95,
            tpot_p95=tpot_p95,
            profiles=[name.strip() for name in profiles.split(",") if name.strip()],
            prices=price or (),
            most=max_workers,
            jobs=jobs,
            out=out,
            as_json_only=json,
        )
    )


@app.command()
def record(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The trace, JSON lines.")],
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="Management URLs of routers; default: http://127.0.0.1:9000."),
    ] = None,
    access_log: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Read this access log instead (of a router with --access-log json --access-log-blocks); - is standard "
            "input, .gz is unpacked; repeat for several routers that share a salt.",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="End after this time; default: at Ctrl-C.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="End after so many requests.")] = None,
) -> None:
    """Record a trace of a cluster's requests, with blocks as numbers and no text, for --trace of other commands."""
    from kvcluster.commands.record import record

    raise typer.Exit(record(urls or (), access_log or (), out, seconds=seconds, limit=limit))
