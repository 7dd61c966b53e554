"""One run against a live endpoint, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.experiment import Play, Played
from bench.loadgen import LoadOptions, Started, drive
from bench.result import RunInfo
from bench.workloads import Workload, WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions(LoadOptions):
    """How to send workloads to an endpoint."""

    block_size: int = 16
    """Tokens of a block, to count matched blocks if the router's header does not state them."""

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ValueError(f"speed must be above 0, not {self.speed}; 1 is real time")


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int, int, int], None]]:
    """A bar that shows the answered requests. It yields a function that takes (sent, answered, failed)."""
    columns = (
        TextColumn("{task.description:<16}", markup=False),
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


def run_title(contender: str, spec: WorkloadSpec) -> str:
    """What a progress bar calls a run."""
    return f"{contender}, seed {spec.seed}" + (f", {spec.rate:.3g}/s" if spec.rate is not None else "")


async def measure(
    url: str,
    workload: Workload,
    options: LiveOptions,
    console: Console,
    strategy: str = "",
    worker_ids: Sequence[str] = (),
    title: str = "",
    started: Started = lambda: None,
) -> Played:
    """Send the workload to `url`; only a progress bar is printed. Raises `EndpointError`."""
    with progress_bar(console, title or strategy or workload.name, workload.count) as progress:
        driven = await drive(url.rstrip("/"), workload, options, progress, started)
    info = RunInfo(
        strategy=strategy or driven.strategy or "endpoint",
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
    return Played(driven.records, info)


def endpoint_play(url: str, options: LiveOptions, console: Console) -> Play:
    """Runs at an endpoint that is there already: its caches are cold at the first run only."""

    async def play(contender: str, spec: WorkloadSpec) -> Played:
        return await measure(url, build_workload(spec), options, console, title=run_title(contender, spec))

    return play
