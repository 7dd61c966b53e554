"""Starts and ends the processes of containers. They never outlive this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kube.kubelet.confinement import ROOT, SANDBOX
from tests.kube.kubelet.environment import local_command


def wrapped(argv: Sequence[str], launch: str, tether: int) -> list[str]:
    """The command line that runs `argv` as `launch` says (`confinement.launch`), and such that it ends with us."""
    command = local_command(argv, sys.executable)
    if command[0] == sys.executable and command[1:2] == ["-m"]:
        command = [sys.executable, "-m", "controller.local.parent_guard", str(tether), *command[2:]]
    # By its file and without site-packages: it starts in no time.
    return [sys.executable, "-ES", str(SANDBOX), launch, *command]


async def spawn(argv: Sequence[str], env: Mapping[str, str], launch: str, log: Path, tether: int) -> Process:
    """Starts a command in a process group of its own, what it writes goes to the end of `log`. Raises `OSError`."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *wrapped(argv, launch, tether),
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            env=dict(env),
            cwd=ROOT,
            pass_fds=(tether,),
            start_new_session=True,
        )


def signal_group(process: Process, number: signal.Signals) -> None:
    """Sends a signal to the process and to all it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


async def ended(process: Process) -> None:
    """Kills the process, unless it has ended, and returns when it is gone: a cancellation meanwhile has to wait."""
    signal_group(process, signal.SIGKILL)
    gone = asyncio.ensure_future(process.wait())
    cancelled: asyncio.CancelledError | None = None
    while not gone.done():
        try:
            await asyncio.shield(gone)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
