"""Questions about processes that tests ask."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
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
