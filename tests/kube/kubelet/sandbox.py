"""`python sandbox.py SPEC COMMAND...`: becomes the command as a container runtime would, and dies with its parent.

SPEC is the JSON of `process.launch`. Where it says `isolate` (root on Linux), the command gets a mount namespace of
its own with its volumes in it, a read-only root where that is asked for, the container's user, and no capability that
it was denied. Only the standard library is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

NOT_FOUND = 127
"""What a shell says of a command it cannot run."""

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1
MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 24, 38, 47
PR_CAP_AMBIENT_RAISE = 2
CAPABILITY_VERSION = 0x20080522
CAP_DAC_READ_SEARCH = 2
LAST_CAPABILITY = 40

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _checked(result, f"mount {target}")


def _read_only(path: str, read_only: bool, *, recursive: bool = False) -> None:
    """mount_setattr(2), which takes the mounts below along."""
    attributes = (ctypes.c_uint64 * 4)(*((MOUNT_ATTR_RDONLY, 0) if read_only else (0, MOUNT_ATTR_RDONLY)), 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))
    _checked(result, f"mount_setattr {path}")


def _bind(descriptor: int, target: str, *, read_only: bool) -> None:
    _mount(f"/proc/self/fd/{descriptor}", target, "", MS_BIND | MS_REC)
    _read_only(target, read_only)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def mount_all(spec: dict[str, Any]) -> None:
    """The container's view of the file system."""
    _checked(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    # What is about to be covered is reached by descriptors.
    sources = [os.open(source, os.O_PATH) for source, _, _ in spec["mounts"]]
    kept = [(path, os.open(path, os.O_PATH)) for path in spec["keep"]]
    if spec["read_only"]:
        _read_only("/", True, recursive=True)
    _mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    _mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777,size=64m")  # noqa: S108  as runtimes have it
    covered = ["/run"]
    for descriptor, (_, target, read_only) in zip(sources, spec["mounts"], strict=True):
        place = os.path.realpath(target)
        if _inside(place, "/run"):
            Path(place).mkdir(parents=True, exist_ok=True)
        _bind(descriptor, place, read_only=read_only)
        covered.append(place)
    for path, descriptor in kept:
        if any(_inside(path, each) for each in covered):
            Path(path).mkdir(parents=True, exist_ok=True)
            _bind(descriptor, path, read_only=True)
    if spec["read_only"]:
        _read_only("/run", True)


def readable_by_all(path: str) -> bool:
    """Whether every user can reach this folder and read it."""
    return all(each.stat().st_mode & 0o5 == 0o5 for each in (Path(path), *Path(path).parents))


def become(spec: dict[str, Any]) -> None:
    """The container's user and its capabilities."""
    reading = spec["uid"] != 0 and not all(map(readable_by_all, spec["keep"]))
    if spec["drop"]:
        # What shall be inheritable below has to stay in the bounding set.
        for capability in {*range(LAST_CAPABILITY + 1)} - ({CAP_DAC_READ_SEARCH} if reading else set()):
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups(spec["groups"])
    os.setresgid(spec["gid"], spec["gid"], spec["gid"])
    os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    if spec["drop"] or spec["uid"] != 0:
        # The repository or the interpreter may lie where that user cannot look, such as in root's home.
        mask = 1 << CAP_DAC_READ_SEARCH if reading else 0
        header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
        _checked(_libc.capset(header, data), "capset")
        if reading:
            _checked(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0), "ambient")
    if spec["no_new_privs"]:
        _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def main() -> None:
    """The command line above."""
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    if spec["isolate"]:
        mount_all(spec)
        become(spec)
    if sys.platform == "linux":
        # Last: a change of the user takes it back.
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != spec["parent"]:
            sys.exit(1)  # it died before the kernel knew
    try:
        os.execvp(command[0], command)  # noqa: S606  no shell is meant
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(NOT_FOUND)


if __name__ == "__main__":
    main()
