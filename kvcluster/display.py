"""How `kvcluster up` shows a local cluster: as a live table on a terminal, as a line for each change, or as JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import orjson
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from controller.local.desired_processes import Role
from controller.local.process import ProcessState, ProcessStatus
from controller.local.view import ClusterView, WorkerView


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses of a running cluster, and where it logs."""

    url: str
    management_url: str
    log_dir: Path
    envoy_admin: str | None = None
    """Unix socket of Envoy's administration interface; None: the router is the data plane."""


class Display(AbstractContextManager["Display", None], ABC):
    """Shows what happens to a cluster. It is entered before the cluster starts and left after it has ended."""

    watches = True
    """Whether `view` shows anything. Where not, the cluster is not observed, which spares its processes work."""

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def say(self, message: str) -> None:
        """Shows a message about the run as a whole."""

    @abstractmethod
    def change(self, status: ProcessStatus) -> None:
        """A process has changed."""

    @abstractmethod
    def ready(self, endpoints: Endpoints) -> None:
        """The cluster serves."""

    @abstractmethod
    def view(self, view: ClusterView) -> None:
        """What the cluster looks like now; called about once a second."""


def _clock() -> str:
    return datetime.now().astimezone().strftime("%H:%M:%S")


def change_line(status: ProcessStatus) -> str:
    """One change of a process, in words."""
    pid = "" if status.pid is None else f" (pid {status.pid})"
    detail = f": {status.detail}" if status.detail else ""
    return f"{status.name} {status.state}{pid}{detail}"


class LineDisplay(Display):
    """One line for each change, for logs and pipes. It shows no load or hit rates, which change all the time."""

    watches = False

    def __init__(self, write: Callable[[str], object], clock: Callable[[], str] = _clock) -> None:
        self._write = write
        self._clock = clock

    def say(self, message: str) -> None:
        self._write(f"{self._clock()} {message}\n")

    def change(self, status: ProcessStatus) -> None:
        self.say(change_line(status))

    def ready(self, endpoints: Endpoints) -> None:
        page = f"{endpoints.management_url}/"
        through = "" if endpoints.envoy_admin is None else f" through Envoy (admin socket {endpoints.envoy_admin})"
        self.say(f"ready: OpenAI API at {endpoints.url}/v1{through}, live page at {page}, management at the same port")

    def view(self, view: ClusterView) -> None:
        return None


class JsonDisplay(Display):
    """One JSON object per line, for programs: `event` is `message`, `process`, `ready` or `status`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last: ClusterView | None = None

    def _event(self, name: str, fields: Mapping[str, object]) -> None:
        content = {"event": name, "time": datetime.now().astimezone().isoformat(), **fields}
        self._write(orjson.dumps(content, default=str, option=orjson.OPT_APPEND_NEWLINE).decode())

    def say(self, message: str) -> None:
        self._event("message", {"message": message})

    def change(self, status: ProcessStatus) -> None:
        self._event("process", asdict(status))

    def ready(self, endpoints: Endpoints) -> None:
        self._event("ready", asdict(endpoints))

    def view(self, view: ClusterView) -> None:
        if view != self._last:
            self._event("status", asdict(view))
        self._last = view


_STYLES = {
    ProcessState.STARTING: "yellow",
    ProcessState.READY: "green",
    ProcessState.BACKOFF: "bold red",
    ProcessState.STOPPING: "yellow",
    ProcessState.STOPPED: "dim",
}


def _state(status: ProcessStatus, view: WorkerView | None) -> Text:
    # Text, not markup: the words of a process may contain brackets.
    if status.state is ProcessState.READY and view is not None and view.routable is False:
        return Text.assemble(("not routable", "bold red"), f" {view.note}".rstrip())
    detail = status.detail or (view.note if view is not None else "")
    return Text.assemble((status.state.value, _STYLES[status.state]), f" {detail}".rstrip())


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _cells(view: WorkerView | None) -> tuple[str, ...]:
    if view is None:
        return "-", "-", "-", "-"
    of = "" if view.capacity is None else f" / {view.capacity:,}"
    rate = "-" if view.hit_rate is None else f"{view.hit_rate:.1%}"
    return _number(view.blocks) + of, _number(view.running), _number(view.waiting), rate


_ROWS = (Role.ROUTER, Role.ENVOY, Role.WORKER)


def status_table(title: str, processes: Iterable[ProcessStatus], views: Mapping[str, WorkerView]) -> Table:
    """A row for each process. `views` has what is known of the workers, by name."""
    headings = ("blocks cached", "running", "waiting", "hit rate", "restarts")
    pid, *figures = (Column(heading, justify="right") for heading in ("pid", *headings))
    table = Table("process", pid, "state", *figures, title=title, title_justify="left")
    for status in sorted(processes, key=lambda status: _ROWS.index(status.role)):
        view = views.get(status.name)
        cells = _cells(view) if status.role is Role.WORKER else ("", "", "", "")
        number = "-" if status.pid is None else str(status.pid)
        table.add_row(status.name, number, _state(status, view), *cells, str(status.restarts))
    return table


class TableDisplay(Display):
    """A live table; messages scroll above it."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._processes: dict[str, ProcessStatus] = {}
        self._views: dict[str, WorkerView] = {}
        # Drawn when something changes: a thread that refreshes it would take time from the engines on this machine.
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> TableDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        self._live.console.print(Text(message))

    def change(self, status: ProcessStatus) -> None:
        self._processes[status.name] = status
        self._draw()

    def ready(self, endpoints: Endpoints) -> None:
        self.say(f"OpenAI API   {endpoints.url}/v1")
        self.say(f"Live page    {endpoints.management_url}/")
        self.say(f"Management   {endpoints.management_url}")
        if endpoints.envoy_admin is not None:
            self.say(f"Envoy admin  curl --unix-socket {endpoints.envoy_admin} http://envoy/")
        self.say(f"Logs         {endpoints.log_dir}")
        self.say("Ctrl-C stops")

    def view(self, view: ClusterView) -> None:
        self._views = {worker.process.name: worker for worker in view.workers}
        self._draw()

    def _draw(self) -> None:
        self._live.update(status_table(self._title, self._processes.values(), self._views), refresh=True)
