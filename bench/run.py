"""One run against a live endpoint: build the workload, send it, print and write the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.loadgen import Driven, LoadOptions, drive
from bench.record import write_records
from bench.report import print_result
from bench.result import Result, RunInfo, summarise, write_json
from bench.workloads import Workload, WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(LoadOptions):
    """What `kvcluster bench` takes."""

    workload: WorkloadSpec
    block_size: int = 16
    """Tokens of a block, to count matched blocks if the router's header does not state them."""
    json: Path | None = None
    """Where the result goes."""
    raw: Path | None = None
    """Where the records go, one line for each request."""

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ValueError(f"speed must be above 0, not {self.speed}; 1 is real time")


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int, int, int], None]]:
    """A bar that shows the answered requests. It yields a function that takes (sent, answered, failed)."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    # Redrawn by `update`: a thread for it would compete with the event loop that measures.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")
        shown = -1

        def update(sent: int, answered: int, failed: int) -> None:
            nonlocal shown
            if answered - shown < total / 200 and answered < total:
                return
            shown = answered
            failures = f", {failed} failed" if failed else ""
            bar.update(task, completed=answered, note=f"{sent - answered} in flight{failures}")
            bar.refresh()

        yield update


async def measure(
    url: str,
    workload: Workload,
    options: BenchOptions,
    console: Console,
    strategy: str = "",
    worker_ids: Sequence[str] = (),
) -> tuple[Result, Driven]:
    """Send the workload to `url` and return the result; only a progress bar is printed. Raises `EndpointError`."""
    with progress_bar(console, strategy or workload.name, workload.count) as progress:
        driven = await drive(url.rstrip("/"), workload, options, progress)
    info = RunInfo(
        strategy=strategy or driven.strategy or "unknown",
        seed=workload.seed,
        config={
            "mode": "live",
            "workload": workload.name,
            "model": driven.model,
            "speed": options.speed,
            "seconds": "emulated: wall seconds times speed",
            **workload.config,
        },
        block_size=options.block_size,
        worker_ids=worker_ids,
        loadgen=driven.health,
        extra_versions={"aiohttp": version("aiohttp")},
    )
    return summarise(driven.records, info), driven


async def run(url: str, options: BenchOptions, console: Console) -> Result:
    """Send a workload to any OpenAI endpoint, print the result and write the files that the options name.

    Raises `WorkloadError` and `EndpointError`.
    """
    workload = build_workload(options.workload)
    result, driven = await measure(url, workload, options, console)
    if options.json is not None:
        write_json(options.json, result)
    if options.raw is not None:
        write_records(options.raw, driven.records)
    print_result(console, result)
    return result
