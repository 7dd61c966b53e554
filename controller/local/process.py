"""Keeps one process of a local cluster running: start, readiness, restart with back-off, clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Protocol

import httpx

from controller.local.desired_processes import DesiredProcess, Role
from runtime.backoff import Backoff

RESTART_BACKOFF = Backoff(0.1, 5.0)
HEALTHY_SECONDS = 10.0
"""After a process has been ready for so long, its back-off starts anew."""
SHUTDOWN_MARGIN = 5.0
"""Seconds between the end of a process's grace period and SIGKILL: time to close what is open and to exit."""
PROBE_TIMEOUT = 5.0
PROBE_INTERVAL = 0.05


class ProcessState(StrEnum):
    """The state of a process, as `kvcluster up` shows it."""

    STARTING = "starting"
    """It is about to run, or runs and has not answered its probe yet."""
    READY = "ready"
    """It has answered its probe."""
    BACKOFF = "backoff"
    """It has died, or could not be started, and waits to be started again."""
    STOPPING = "stopping"
    """It was told to stop and finishes what runs."""
    STOPPED = "stopped"
    """It does not run and will not be started."""


class ProcessEvent(Enum):
    """What happens to a process."""

    SPAWNED = auto()
    PROBE_ANSWERED = auto()
    DIED = auto()
    """It ended by itself, or could not be spawned."""
    TERMINATED = auto()
    """It was sent SIGTERM."""
    GONE = auto()
    """It does not run, after it was told to stop."""


PROCESS_TRANSITIONS: Mapping[tuple[ProcessState, ProcessEvent], ProcessState] = {
    (ProcessState.STARTING, ProcessEvent.SPAWNED): ProcessState.STARTING,
    (ProcessState.STARTING, ProcessEvent.PROBE_ANSWERED): ProcessState.READY,
    (ProcessState.STARTING, ProcessEvent.DIED): ProcessState.BACKOFF,
    (ProcessState.STARTING, ProcessEvent.TERMINATED): ProcessState.STOPPING,
    (ProcessState.STARTING, ProcessEvent.GONE): ProcessState.STOPPED,
    (ProcessState.READY, ProcessEvent.DIED): ProcessState.BACKOFF,
    (ProcessState.READY, ProcessEvent.TERMINATED): ProcessState.STOPPING,
    (ProcessState.READY, ProcessEvent.GONE): ProcessState.STOPPED,
    (ProcessState.BACKOFF, ProcessEvent.SPAWNED): ProcessState.STARTING,
    (ProcessState.BACKOFF, ProcessEvent.DIED): ProcessState.BACKOFF,
    (ProcessState.BACKOFF, ProcessEvent.GONE): ProcessState.STOPPED,
    (ProcessState.STOPPING, ProcessEvent.GONE): ProcessState.STOPPED,
}


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A process at one moment. `pid` is None while it does not run; `detail` explains the state where needed."""

    name: str
    role: Role
    url: str
    state: ProcessState
    pid: int | None
    restarts: int
    detail: str = ""


def failures_in_a_row(before: int, ready_for: float) -> int:
    """How often a process has ended in a row, given the count so far and the seconds for which it was ready this time.
    One that was ready for `HEALTHY_SECONDS` starts anew."""
    return 1 if ready_for >= HEALTHY_SECONDS else before + 1


def describe_exit(code: int) -> str:
    """A return code in words. A negative one is the signal that ended the process."""
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


_OWN_SETTINGS = ("WORKER_", "ROUTER_", "ROUTING_STRATEGY")


def environment(inherited: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: `inherited` without settings of other workers and routers, then the manifest's."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(_OWN_SETTINGS)}
    return {**kept, "PYTHONUNBUFFERED": "1", **own}


class Control(Protocol):
    """What a supervisor asks of a process, beside its signals."""

    async def ready(self) -> bool:
        """Whether it serves."""

    async def drain(self) -> None:
        """Return when it may be sent SIGTERM."""


class HttpControl:
    """Of a process that finishes its requests after SIGTERM by itself. `probe`: a URL that answers 200."""

    def __init__(self, client: httpx.AsyncClient, probe: str) -> None:
        self._client = client
        self._probe = probe

    async def ready(self) -> bool:
        # The socket listens before the process does. The request waits in its queue, so that most probes need one try.
        try:
            answer = await self._client.get(self._probe, timeout=PROBE_TIMEOUT)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    async def drain(self) -> None:
        return None


class ManagedProcess:
    """One process, kept running from `start` to `stop`.

    `descriptors` are the sockets it inherits, by base URL. `parent_pipe` is the reading end of a pipe whose closing
    tells it that its parent is gone (`parent_guard`). `on_change` is called with every change of its status, `echo` (if
    any) with (name, line) for every line it writes.
    """

    def __init__(
        self,
        desired: DesiredProcess,
        *,
        descriptors: Mapping[str, int],
        parent_pipe: int,
        log: Path,
        control: Control,
        on_change: Callable[[ProcessStatus], None],
        echo: Callable[[str, str], None] | None = None,
    ) -> None:
        self.desired = desired
        self.log = log
        self.failed_starts = 0
        """Exits in a row without having been ready."""
        self.exit_code: int | None = None
        """Of the last process that ended; the number of a signal is negative."""
        self._sockets = tuple((flag, descriptors[url]) for flag, url in desired.listeners)
        self._parent_pipe = parent_pipe
        self._control = control
        self._on_change = on_change
        self._echo = echo
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()
        self._ready_at: float | None = None
        self._status = ProcessStatus(desired.name, desired.role, desired.url, ProcessState.STARTING, None, 0)
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> ProcessStatus:
        """The process now."""
        return self._status

    def start(self) -> None:
        """Starts the process, and starts it again whenever it dies."""
        self._task = asyncio.create_task(self._keep_running(), name=f"supervise {self.desired.name}")

    def stop(self) -> None:
        """Begins to end the process: SIGTERM, its grace period, then SIGKILL. It is not started again. Idempotent."""
        self._stopping.set()

    async def ended(self) -> None:
        """Returns when the process was stopped and is gone."""
        if self._task is not None:
            await self._task

    def kill(self) -> None:
        """Cuts the grace period of `stop` short."""
        self._killing.set()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines the process wrote."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _advance(self, event: ProcessEvent, detail: str = "") -> None:
        """Enters the state that follows, and calls `on_change`."""
        state = PROCESS_TRANSITIONS[self._status.state, event]
        process = self._process
        pid = process.pid if process is not None and process.returncode is None else None
        restarts = self._status.restarts + (event is ProcessEvent.DIED)
        self._status = replace(self._status, state=state, pid=pid, restarts=restarts, detail=detail)
        self._on_change(self._status)

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping.is_set():
            self._ready_at = None
            how = await self._run_once()
            if self._stopping.is_set():
                break
            ready_for = 0.0 if self._ready_at is None else loop.time() - self._ready_at
            self.failed_starts = self.failed_starts + 1 if self._ready_at is None else 0
            failures = failures_in_a_row(failures, ready_for)
            delay = RESTART_BACKOFF.delay(failures)
            self._advance(ProcessEvent.DIED, f"{how}; starting again in {delay:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        self._advance(ProcessEvent.GONE)

    async def _run_once(self) -> str:
        """Spawns the process and waits until it has ended; returns how, in words."""
        try:
            self._process = process = await self._spawn()
        except OSError as error:
            return f"could not be started: {error}"
        self._advance(ProcessEvent.SPAWNED)
        helpers = [asyncio.create_task(self._watch_readiness())]
        if process.stdout is not None and self._echo is not None:
            helpers.append(asyncio.create_task(self._copy_output(process.stdout, self._echo)))
        exited = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((exited, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                helpers[0].cancel()
                await self._terminate(process, exited)
            self.exit_code = await exited
            return describe_exit(self.exit_code)
        finally:
            stopped.cancel()
            # What the process wrote last is still in the pipe.
            await asyncio.gather(*helpers[1:])
            helpers[0].cancel()
            await asyncio.gather(stopped, helpers[0], return_exceptions=True)

    async def _spawn(self) -> Process:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        sockets = [f"{flag}={descriptor}" for flag, descriptor in self._sockets]
        with self.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.desired.guard, str(self._parent_pipe), self.desired.program),
                *(*self.desired.args, *sockets),
                stdin=DEVNULL,
                stdout=PIPE if self._echo else log,
                stderr=STDOUT,
                env=environment(os.environ, self.desired.env),
                pass_fds=(self._parent_pipe, *(descriptor for _, descriptor in self._sockets)),
                # A terminal sends Ctrl-C to its whole foreground group, but the order in which processes stop is ours.
                start_new_session=True,
            )

    async def _watch_readiness(self) -> None:
        while not await self._control.ready():  # noqa: ASYNC110  another process is polled, which sets no event
            await asyncio.sleep(PROBE_INTERVAL)
        self._ready_at = asyncio.get_running_loop().time()
        self._advance(ProcessEvent.PROBE_ANSWERED)

    async def _copy_output(self, output: asyncio.StreamReader, echo: Callable[[str, str], None]) -> None:
        with self.log.open("ab", buffering=0) as log:
            while chunk := await _line(output):
                log.write(chunk)
                echo(self.desired.name, chunk.decode(errors="replace").rstrip("\n"))

    async def _terminate(self, process: Process, exited: asyncio.Task[int]) -> None:
        self._advance(ProcessEvent.TERMINATED)
        _signal_group(process, signal.SIGCONT)  # a frozen process would not see the other signal
        killing = asyncio.create_task(self._killing.wait())
        drained = asyncio.create_task(self._control.drain())
        timeout = self.desired.grace + SHUTDOWN_MARGIN
        await asyncio.wait((drained, exited, killing), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        await asyncio.gather(drained, return_exceptions=True)
        _signal_group(process, signal.SIGTERM)
        await asyncio.wait((exited, killing), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        killing.cancel()
        if not exited.done():
            _signal_group(process, signal.SIGKILL)


async def _line(output: asyncio.StreamReader) -> bytes:
    """The next line, or a piece of a line that is longer than the reader's buffer; empty at the end."""
    try:
        return await output.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await output.readexactly(overrun.consumed)


def _signal_group(process: Process, number: signal.Signals) -> None:
    # The process leads a group of its own, to which the processes that it starts belong as well.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
