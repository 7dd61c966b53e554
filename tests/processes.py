"""Questions about processes that tests ask."""

from __future__ import annotations

import asyncio
import contextlib
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


async def eventually(condition: Callable[[], Any], deadline: float = 30.0) -> None:
    """Returns once the condition holds. Fails after `deadline` seconds, which is a hang, not a slow machine."""
    async with asyncio.timeout(deadline):
        while not condition():  # noqa: ASYNC110  conditions of the machine set no event
            await asyncio.sleep(0.01)
