"""The parent guard: runs a module in this process, and kills the process as soon as its parent is gone.

    python -m controller.local.parent_guard DESCRIPTOR MODULE [ARGS...]

DESCRIPTOR is the reading end of a pipe of which the parent holds the only writing end. It closes with the parent,
however that ends, on every system. A stopped process (SIGSTOP) does not notice that; on Linux the kernel's
parent-death signal reaches it as well. Only the standard library is imported here.
"""

import os
import runpy
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; it can on Linux alone."""
    if sys.platform == "linux":
        import ctypes

        # Where this is refused (by a seccomp profile, for example), the pipe is left.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(descriptor: int) -> None:
    os.set_inheritable(descriptor, False)

    def watch() -> None:
        # Signals go to the threads that expect them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-guard", daemon=True).start()


def main() -> None:
    """The command line above."""
    descriptor, module = int(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    die_with_parent()
    _watch(descriptor)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
