"""Commands that measure and compare: their arguments and options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.apps import Manifest, app, profiles
from kvcluster.options import EndpointOptions, LoadOptions, MeasureOptions, takes

Strategies = Annotated[str, typer.Option(metavar="A,B,...", help="Strategies to compare, separated by commas.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for results, tables, pictures and report.html.")]
Timeout = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Give a request up after this many seconds.")]


@app.command()
@takes("load", LoadOptions)
@takes("measured", MeasureOptions)
@takes("endpoint", EndpointOptions)
def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Base URL of any OpenAI endpoint, say http://127.0.0.1:8000.")
    ],
    load: LoadOptions,
    measured: MeasureOptions,
    endpoint: EndpointOptions,
    speed: Annotated[
        float, typer.Option(metavar="S", help="Divide arrival times by S, the speed at which the engines run.")
    ] = 1.0,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the endpoint's first model.")] = None,
    timeout: Timeout = 600,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result of each run as a line of JSON, and all else on stderr.")
    ] = False,
    result: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result of the first run here.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for results, tables, pictures and report.html.")
    ] = None,
) -> None:
    """Send a workload to a running OpenAI endpoint, and measure."""
    from kvcluster.commands.measure import bench

    raise typer.Exit(
        bench(
            url,
            load,
            measured,
            endpoint,
            speed=speed,
            model=model,
            timeout=timeout,
            as_json=json,
            result=result,
            out=out,
        )
    )


@app.command()
@takes("load", LoadOptions)
@takes("measured", MeasureOptions)
@takes("endpoint", EndpointOptions)
def compare(
    manifest: Manifest,
    load: LoadOptions,
    measured: MeasureOptions,
    endpoint: EndpointOptions,
    strategies: Strategies = "cache_aware,round_robin,least_loaded",
    router: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="Another router in front of the same workers; repeat for several. {port}, {workers} (or {commas}: "
            "separated by commas) and {model} are filled in.",
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(metavar="S", help="Run engines and arrivals S times as fast; default: the manifest's speed."),
    ] = None,
    timeout: Timeout = 600,
    out: Out = Path("results"),
    secrets: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Secrets that the manifest names, as for `kvcluster up`.")
    ] = None,
) -> None:
    """Run a manifest once per strategy and other router, cold, under the same workload, and compare."""
    from kvcluster.commands.measure import compare

    names = strategies.split(",")
    raise typer.Exit(
        compare(
            manifest,
            names,
            router or (),
            load,
            measured,
            endpoint,
            speed=speed,
            timeout=timeout,
            out=out,
            secrets=secrets,
        )
    )


@profiles.command()
def fit(
    raw: Annotated[list[Path], typer.Argument(metavar="RAW...", help="What `bench --raw` wrote: idle and busy runs.")],
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="Profile with the memory of model and GPU.")
    ] = "llama-2-13b-a100-40gb",
    check: Annotated[
        Path | None, typer.Option(metavar="RAW", help="Also say how well the result describes this other run.")
    ] = None,
) -> None:
    """Fit the times of a profile to recorded runs of a real engine, and print them as part of a manifest."""
    from kvcluster.commands.profile import fit

    raise typer.Exit(fit(raw, profile, check))
