"""Counts instructions instead of time: the same on a busy machine as on an idle one.

A program hands each part of it that is to be counted to `Counter.count`, and is run by `profiles` under valgrind's
callgrind, which counts the instructions that the process itself executes (not the kernel's) within these calls, in all
of its libraries. Counts of one build of Python differ by less than a percent from run to run; another build has others.
"""

from __future__ import annotations

import collections
import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_START, _ZERO, _DUMP = 0x43540004, 0x43540001, 0x43540000
"""What callgrind can be asked for (`callgrind.h`): to begin to instrument, to count from 0, to write a profile."""
_ASK = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
"""A function of x86-64 that passes the address of a request on to valgrind (`valgrind.h`), which knows it by the four
rotations, which together change nothing."""
_OBJECT = re.compile(r"c?ob=\((\d+)\)(?: (.*))?")
_COST = re.compile(r"[+*-]?\d* (\d+)")


class CountingError(Exception):
    """Nothing could be counted; the message says why."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What one call took."""

    instructions: int
    by_library: Mapping[str, int]
    """Those that each file (the base name) executed itself."""


class Counter:
    """Counts in this process. Outside valgrind its calls are made, and nothing is counted."""

    def __init__(self) -> None:
        """Raises `CountingError` on machines whose instructions are not x86-64."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise CountingError(f"instructions are counted on x86-64 only, not on {platform.machine()}")
        self._code = mmap.mmap(-1, len(_ASK), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code.write(_ASK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._ask = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)
        self._started = False

    def count(self, call: Callable[[], object]) -> None:
        """Make this call, and write a profile of it. What ran before the first count is much faster."""
        if not self._started:
            self._started = True
            self._request(_START)
            call()  # callgrind translates what runs the first time
        self._request(_ZERO)
        call()
        self._request(_DUMP)

    def _request(self, code: int) -> None:
        request = (ctypes.c_ulong * 6)(code)
        self._ask(ctypes.addressof(request))


def build() -> str:
    """What counts depend on: the version of Python, who compiled it, and for which machine."""
    return f"{platform.python_version()} {platform.python_compiler()} {platform.machine()}"


def profiles(arguments: Sequence[str]) -> tuple[list[Profile], str]:
    """Run `python ARGUMENTS`. Returns what the calls that it counted took, in their order, and what it printed.
    Raises `CountingError`."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CountingError("instructions are counted by valgrind, which is not installed: apt install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = [
            valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--quiet",
            sys.executable, *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)  # noqa: S603  ours
        if done.returncode:
            raise CountingError(f"{' '.join(arguments)} ended with exit code {done.returncode}")
        dumps = sorted(Path(folder).glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        return [parse(dump.read_text()) for dump in dumps], done.stdout.decode()


def parse(dump: str) -> Profile:
    """A profile in callgrind's format (its manual: "Callgrind Format Specification")."""
    names: dict[str, str] = {}
    by_library: collections.Counter[str] = collections.Counter()
    library, inclusive = "", False
    for line in dump.splitlines():
        if line.startswith(("ob=", "cob=")) and (found := _OBJECT.match(line)):
            if found[2]:
                names[found[1]] = Path(found[2]).name
            if line.startswith("ob="):
                library = names[found[1]]
        elif line.startswith("calls="):
            inclusive = True  # the line that follows is what the callee took, which is counted there
        elif cost := _COST.fullmatch(line):
            if not inclusive:
                by_library[library] += int(cost[1])
            inclusive = False
    return Profile(sum(by_library.values()), dict(by_library))
