"""Settings that apply to every test run."""

import asyncio
import gc
import os
import sys

import hypothesis

# Without bytecode files every process that a test starts, and every worker of pytest-xdist, would compile its imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Half as many examples as hypothesis would try: each run on a developer's machine tries others. They have no deadline,
# because their duration depends on the machine. A failure prints what repeats it. Continuous integration tries the same
# examples each time, so that a change does not fail because of an example that is new.
_EVERYWHERE = {
    "max_examples": 50,
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("everywhere", **_EVERYWHERE)
hypothesis.settings.register_profile("ci", **_EVERYWHERE, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "everywhere")

# What is imported while tests are collected stays: to walk it again and again would take a fifth of that time.
gc.disable()


def pytest_configure() -> None:
    # pytest-asyncio calls get_event_loop() before its first test. In Python 3.11 that would create a loop that nobody
    # closes, and the test during which the garbage collector finds it would fail.
    asyncio.set_event_loop(None)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
