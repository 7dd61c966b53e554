"""Commands about one KVCluster, on this machine or in Kubernetes: their arguments and options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.apps import Manifest, app, plugin
from kvcluster.options import LOCAL_ROUTER, Ca

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the KVCluster.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NS", help="Its namespace; default: the context's.")
]
Context = Annotated[
    str | None, typer.Option(metavar="NAME", help="Context of the kubeconfig; default: its current one.")
]
Kubeconfig = Annotated[Path | None, typer.Option(metavar="FILE", help="Default: $KUBECONFIG, else ~/.kube/config.")]


@app.command()
def up(
    file: Manifest,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the OpenAI API; 0 takes a free one.")] = 8000,
    management_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of health, metrics and explanations; 0 takes a free one.")
    ] = 9000,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this strategy instead of the manifest's.")
    ] = None,
    data_plane: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who passes requests on instead of the manifest's choice: router or envoy."),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(metavar="N", help="Run the engines N times as fast as real ones."),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the processes' logs; default: a new temporary one."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the processes' logs, on stderr.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Report one JSON object per line.")] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Give up when not ready by then.")] = 120,
    secrets: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with a folder for each Secret that the manifest names: API keys, certificates."
        ),
    ] = None,
    self_signed: Annotated[
        bool, typer.Option("--self-signed", help="Serve HTTPS with a certificate that is made now.")
    ] = False,
) -> None:
    """Run a KVCluster on this machine, until Ctrl-C."""
    from kvcluster.commands.up import UpOptions, up

    options = UpOptions(
        port=port,
        management_port=management_port,
        strategy=strategy,
        data_plane=data_plane,
        speed=speed,
        log_dir=log_dir,
        verbose=verbose,
        json=json,
        timeout=timeout,
        secrets=secrets,
        self_signed=self_signed,
    )
    raise typer.Exit(up(file, options))


@app.command()
def route(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt, or - for standard input.")],
    router: Annotated[str, typer.Option(metavar="URL", help="Management URL of the router.")] = LOCAL_ROUTER,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's chat message.")] = False,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the router's model.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the router's answer unchanged.")] = False,
) -> None:
    """Explain where a prompt would be sent, and why, without sending it."""
    from kvcluster.commands.route import route

    raise typer.Exit(route(prompt, router=router, chat=chat, model=model, as_json=json))


@app.command()
@plugin.command()
def explain(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    json: Annotated[bool, typer.Option("--json", help="Print the page as JSON.")] = False,
) -> None:
    """Show one page about a KVCluster in a Kubernetes cluster: what is wrong, pod by pod, and what to do.

    Exit code 0: shown; 1: it could not be read; 2: it does not exist, or there is no cluster to ask.
    """
    from kvcluster.commands.explain import explain

    raise typer.Exit(explain(name, namespace=namespace, context=context, kubeconfig=kubeconfig, as_json=json))


Sort = Annotated[
    str,
    typer.Option(metavar="COLUMN", help="Sort the workers by this column; -COLUMN: the other way round."),
]
Once = Annotated[bool, typer.Option("--once", help="Print what there is now, and end.")]
Lines = Annotated[bool, typer.Option("--json", help="Print each document as a line of JSON.")]


@app.command()
def top(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL|NAME]",
            help="Management URL of a router, or the name of a KVCluster in Kubernetes; default: http://127.0.0.1:9000.",
        ),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    sort: Sort = "worker",
    once: Once = False,
    json: Lines = False,
    ca: Ca = None,
) -> None:
    """Show routers, workers, history and decisions live in the terminal. The key ? lists the keys.

    Exit code 0: ended; 1: it cannot be read; 2: it does not exist, or there is no cluster to ask.
    """
    from kvcluster.commands.top import target as meant
    from kvcluster.commands.top import top

    of = meant(target, namespace, context, kubeconfig, ca)
    raise typer.Exit(top(of, sort=sort, once=once, as_json=json))


@plugin.command("top")
def plugin_top(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    sort: Sort = "worker",
    once: Once = False,
    json: Lines = False,
) -> None:
    """Show routers, workers, history and decisions live in the terminal. The key ? lists the keys."""
    from kvcluster.commands.top import Target, top

    raise typer.Exit(top(Target(None, name, namespace, context, kubeconfig), sort=sort, once=once, as_json=json))


@app.command()
@plugin.command()
def dashboard(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Local port of the page; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Open the live page of a KVCluster in a Kubernetes cluster, until Ctrl-C.

    The page is forwarded from a router pod through the API server, as kubectl port-forward does; when that pod is
    replaced, from another one.

    Exit code 0: ended; 1: it cannot be reached; 2: it does not exist, or there is no cluster to ask.
    """
    from kvcluster.commands.dashboard import dashboard

    raise typer.Exit(
        dashboard(name, namespace=namespace, context=context, kubeconfig=kubeconfig, port=port, browser=browser)
    )


@app.command()
def metrics(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="Management URLs of routers; default: http://127.0.0.1:9000."),
    ] = None,
    workers: Annotated[
        bool, typer.Option("--workers", help="Also read the workers' own metrics, at the URLs that the routers know.")
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Also the figures of the next SECONDS alone."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="NAME", help="How they are printed: table, json or csv.")
    ] = "table",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    ca: Ca = None,
) -> None:
    """Print the figures that routers have collected: hit rate, latencies, hits against misses, workers, match lengths.

    Figures of several routers are added up.
    """
    from kvcluster.commands.metrics import metrics

    raise typer.Exit(metrics(urls or [], workers=workers, interval=interval, form="json" if json else form, ca=ca))


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition of KVCluster, for `kubectl apply --server-side -f -`."""
    from controller.api.crd import crd_yaml

    typer.echo(crd_yaml(), nl=False)
