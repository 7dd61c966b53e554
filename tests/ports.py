"""Ports for processes that cannot be given a listening socket."""

from __future__ import annotations

import itertools
import os
import random
import re
import socket

_FIRST, _LAST = 10_000, 32_000
"""Below those that Linux gives out by itself: nothing that listens on port 0 or connects gets one of these."""

_SLICES = 20
"""One for each of pytest-xdist's workers: two tests that run at a time never look for a port in the same one."""


def _ports() -> itertools.cycle[int]:
    worker = re.search(r"\d+", os.environ.get("PYTEST_XDIST_WORKER", ""))
    size = (_LAST - _FIRST) // _SLICES
    first = _FIRST + size * (int(worker[0]) % _SLICES if worker else random.randrange(_SLICES))
    # Not from the start: another run of the tests may be under way.
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
