"""Processes that tests start: ports for them, whether they run, and waiting for what they do."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import random
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


def runs(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    if Path("/proc/self").exists():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(listed.stdout.strip()) and not listed.stdout.startswith("Z")


async def eventually(condition: Callable[[], Any], what: str = "the condition holds", within: float = 60.0) -> float:
    """Seconds until the condition, a function or a coroutine function, held.

    Fails after `within` seconds, which is a hang and not a slow machine, and says `what` did not come about.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    while True:
        held = condition()
        if inspect.isawaitable(held):
            held = await held
        if held:
            return loop.time() - start
        assert loop.time() - start < within, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.02)


_FIRST, _LAST = 10_000, 32_000
"""These ports are below those that Linux assigns itself, so no socket bound to port 0 and no connection gets one."""

_SLICES = 20
"""One for each worker of pytest-xdist, so that two tests that run at the same time never use the same slice."""


def _ports() -> itertools.cycle[int]:
    worker = re.search(r"\d+", os.environ.get("PYTEST_XDIST_WORKER", ""))
    size = (_LAST - _FIRST) // _SLICES
    first = _FIRST + size * (int(worker[0]) % _SLICES if worker else random.randrange(_SLICES))
    # Begin at a random port, because another run of the tests may be in progress.
    start = random.randrange(size)
    return itertools.cycle([first + (start + number) % size for number in range(size)])


_NEXT = _ports()


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` on which nobody listens and that no other test is given."""
    for port in itertools.islice(_NEXT, _LAST - _FIRST):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"no port of {host} is free")
