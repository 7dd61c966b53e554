"""Commands in virtual time: their arguments and options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.apps import Manifest, app
from kvcluster.cli.laboratory import Out, Raw, Strategies
from kvcluster.options import LoadOptions, takes

NetworkDelay = Annotated[
    float,
    typer.Option(
        min=0, metavar="SECONDS", help="From router to worker, one way; what processes add can be counted in."
    ),
]
FeedDelay = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="From a change of a cache to the router's view of it.")
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
def simulate(
    manifest: Manifest,
    load: LoadOptions,
    strategies: Strategies = "cache_aware,round_robin,least_loaded,longest_prefix",
    network_delay: NetworkDelay = 0.001,
    feed_delay: FeedDelay = 0.001,
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
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="Play every combination of these values; repeat for several parameters: workers, strategy, rate, "
            "seed, limit, profile, blocks, cpuBlocks, routers, networkDelay, feedDelay.",
        ),
    ] = None,
    jobs: Jobs = None,
    out: Out = Path("results"),
    raw: Raw = None,
) -> None:
    """Compare strategies in virtual time: the same engine and router code, no processes, no waiting."""
    from bench.simulation import Delays
    from kvcluster.commands.simulate import simulate

    raise typer.Exit(
        simulate(
            manifest,
            strategies.split(","),
            load,
            Delays(network_delay, feed_delay),
            cpu_blocks=cpu_blocks,
            scenario=scenario,
            sweep=sweep or (),
            jobs=jobs,
            out=out,
            raw=raw,
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
