"""`python leash.py PARENT COMMAND...`: becomes the command, which dies with the process PARENT.

For commands that are no Python modules (those run under `controller.local.tether`). Linux only: elsewhere, and in what
the command itself starts, nothing ends with the parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

NOT_FOUND = 127
"""What a shell says of a command it cannot run."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """The command line above."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)  # it died before the kernel knew
    try:
        os.execvp(command[0], command)  # noqa: S606  no shell is meant
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(NOT_FOUND)


if __name__ == "__main__":
    main()
