"""Runs a command, and ends it and all its children when a pipe closes, however the holder of the pipe ended.

    python -m bench.guard DESCRIPTOR COMMAND [ARGS...]

DESCRIPTOR is the reading end of a pipe. When it closes the command's process group gets SIGTERM and, after a grace
period, SIGKILL. Only the standard library is imported here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
NOT_FOUND = 127
"""Exit code, as shells have it, of a command that cannot be run."""


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def main() -> None:
    """The command line above."""
    descriptor, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(descriptor, False)
    try:
        child = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - the user's command
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be run: {error.strerror}\n")
        sys.exit(NOT_FOUND)

    def end() -> None:
        while os.read(descriptor, 1):
            pass
        _signal(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        _signal(child.pid, signal.SIGKILL)

    threading.Thread(target=end, name="guard", daemon=True).start()
    code = child.wait()
    _signal(child.pid, signal.SIGKILL)  # what it started and left
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
