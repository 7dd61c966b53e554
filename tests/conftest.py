"""Settings of every test run."""

import asyncio
import gc
import os
import sys

import hypothesis

# Without files of bytecode every process that a test starts, and every worker of pytest-xdist, compiles all it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# How long an example takes says something of the machine. What fails can be repeated from what is printed; continuous
# integration tries the same examples each time, so that a change fails for what it changes.
_EVERYWHERE = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("everywhere", **_EVERYWHERE)
hypothesis.settings.register_profile("ci", **_EVERYWHERE, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "everywhere")


def pytest_configure() -> None:
    # Python 3.11's get_event_loop(), which pytest-asyncio asks before its first test, would make a loop that nobody
    # closes; whichever test the garbage collector then runs in would fail for it.
    asyncio.set_event_loop(None)


def pytest_collection_finish() -> None:
    # What was imported stays: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()
