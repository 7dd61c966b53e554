"""Settings of every test run."""

import asyncio


def pytest_configure() -> None:
    # Python 3.11's get_event_loop(), which pytest-asyncio asks before its first test, would make a loop that nobody
    # closes; whichever test the garbage collector then runs in would fail for it.
    asyncio.set_event_loop(None)
