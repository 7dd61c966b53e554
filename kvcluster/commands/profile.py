"""`kvcluster profile fit`: the times of a real engine, from what `kvcluster bench --raw` recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
import yaml
from pydantic.alias_generators import to_camel

from bench.numbers import percent
from bench.profile_fit import Agreement, agreement, fit_latency
from bench.record import read_records
from kvcache.profiles import LATENCY_TIMES, format_latency, profile
from kvcluster.terminal import exits


def _said(what: str, figures: Agreement) -> str:
    return (
        f"# {what}: median error of {figures.prefills} times to first token {percent(figures.prefill_error)}, "
        f"of the decode steps of {figures.answers} answers {percent(figures.decode_error)}"
    )


@exits(OSError)
def fit(raw: Sequence[Path], name: str, check: Path | None) -> None:
    """Prints the part of a manifest that sets the times of the engine that answered the requests of `raw`."""
    runs = [read_records(file) for file in raw]
    latency = fit_latency(runs, profile(name).latency)
    times = {time: float(f"{getattr(latency, time):.4g}") for time in LATENCY_TIMES}
    typer.echo(_said("fitted", agreement(runs, latency)))
    if check is not None:
        typer.echo(_said(str(check), agreement([read_records(check)], latency)))
    typer.echo(f"# as a flag of router and worker: --latency={format_latency(times)}")
    latency_field = {to_camel(time): seconds for time, seconds in times.items()}
    typer.echo(
        yaml.safe_dump({"spec": {"model": {"profile": name, "latency": latency_field}}}, sort_keys=False), nl=False
    )
