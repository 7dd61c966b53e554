"""The guard of a program that is not Python: it ends with its parent, and its watcher with it.

Not covered: processes in Python (test_cluster), and Envoy (tests/envoy/test_local_mode.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.processes import eventually, runs

pytestmark = pytest.mark.process


@asynccontextmanager
async def guarded(*command: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """The guard, and the end of the pipe that stands for its parent."""
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "controller.local.exec_guard", str(read_end), *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=(read_end,),
        start_new_session=True,
    )
    os.close(read_end)
    try:
        yield process, write_end
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_program_ends_with_its_parent() -> None:
    async with guarded("/bin/sh", "-c", "echo started; exec sleep 1000") as (process, parent):
        assert process.stdout is not None
        assert await process.stdout.readline() == b"started\n"
        os.close(parent)
        assert await process.wait() == -signal.SIGKILL


async def test_the_watcher_outlives_signals_to_the_group_and_ends_with_the_program() -> None:
    program = "trap 'echo told; exit 7' TERM; echo started; while :; do sleep 0.05; done"
    async with guarded("/bin/sh", "-c", program) as (process, parent):
        assert process.stdout is not None
        assert await process.stdout.readline() == b"started\n"
        group = os.getpgid(process.pid)
        os.killpg(group, signal.SIGTERM)
        assert await process.stdout.readline() == b"told\n"
        assert await process.wait() == 7
        await eventually(lambda: not _members(group), "the watcher ends")
        os.close(parent)


def _members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_program_that_does_not_exist_is_named() -> None:
    async with guarded("/nowhere/envoy") as (process, parent):
        _, said = await process.communicate()
        assert process.returncode == 1
        assert said.decode() == "/nowhere/envoy cannot be run: No such file or directory\n"
        os.close(parent)
        assert not runs(process.pid)
