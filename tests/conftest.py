"""Settings of every test run."""

import asyncio

from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine alone.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure() -> None:
    # Python 3.11's get_event_loop(), which pytest-asyncio asks before its first test, would make a loop that nobody
    # closes; whichever test the garbage collector then runs in would fail for it.
    asyncio.set_event_loop(None)
