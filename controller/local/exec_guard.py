"""The guard of a program that is not Python: becomes that program, which ends as soon as its parent is gone.

    python -m controller.local.exec_guard DESCRIPTOR PROGRAM [ARGS...]

DESCRIPTOR is what `parent_guard` takes. The program cannot watch it, so that a small process beside it does, which ends
with the program. Only the standard library is imported here.
"""

import os
import select
import signal
import sys

from controller.local.parent_guard import die_with_parent


def _watch(parent: int, program: int, ended: int) -> None:
    """Kill `program` when `parent` closes; `ended` closes when it has ended by itself."""
    # What ends the program's process group is not meant for this process, which ends after the program.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    ready, _, _ = select.select((parent, ended), (), ())
    if ended not in ready:
        os.kill(program, signal.SIGKILL)


def main() -> None:
    """The command line above."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    program = os.getpid()
    ended, held = os.pipe()
    if os.fork() == 0:
        os.close(held)
        _watch(parent, program, ended)
        os._exit(0)
    os.close(ended)
    os.set_inheritable(held, True)
    os.set_inheritable(parent, False)
    die_with_parent()  # the kernel remembers it for the program
    try:
        os.execv(command[0], command)  # noqa: S606  no shell is wanted
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
