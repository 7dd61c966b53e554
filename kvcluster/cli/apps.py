"""The commands' groups, and the argument that most of them take."""

from __future__ import annotations

from typing import Annotated

import typer


def _app(name: str, text: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = _app("kvcluster", "KV-cache-aware routing for LLM engines.")
profiles = _app("profile", "How fast an engine is.")
app.add_typer(profiles)
plugin = _app("kubectl kvcluster", "What kubectl cannot show about a KVCluster.")
"""`kubectl-kvcluster`: kubectl runs a command of that name for `kubectl kvcluster`."""


@plugin.callback()
def _commands() -> None:
    # Without a callback, Typer drops the name of a command that is the only one.
    pass


Manifest = Annotated[str, typer.Argument(metavar="FILE", help="KVCluster manifest, YAML or JSON; - is standard input.")]
