"""Runs a module in this process, which dies at once with the process that started it, however that one ended.

    python -m controller.local.parent_guard DESCRIPTOR MODULE [ARGS...]

DESCRIPTOR is the reading end of a pipe of which the parent holds the only writing end: it closes with the parent,
also when that is killed, on every system. A stopped process (SIGSTOP) does not notice a pipe; on Linux the kernel's
parent-death signal reaches it too. Only the standard library is imported here.
"""

import os
import runpy
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def _die_with_parent(descriptor: int) -> None:
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        import ctypes

        # A refusal (a seccomp profile, say) leaves the pipe.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Signals are for the threads that expect them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-guard", daemon=True).start()


def main() -> None:
    """The command line above."""
    descriptor, module = int(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    _die_with_parent(descriptor)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
