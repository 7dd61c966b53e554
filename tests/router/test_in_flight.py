"""Requests in flight: which of them a timeout or the loss of a worker ends, and how.

Covered: every timeout on times that the test gives, aborts, and clients that leave at the moment of an abort. Not
covered: what becomes of a request then (test_failures.py, test_retries.py), and who measures the silence of workers
(tests/router/core).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from router.core.retries import FailureCause
from router.upstream.in_flight import NOT_WAITING, InFlight, InFlightRequest, RequestEvent, UpstreamTimeouts
from router.upstream.interface import UpstreamError

URL, OTHER = "http://a:1", "http://b:1"
TIMEOUTS = UpstreamTimeouts(answer=100.0, idle=50.0, stall=10.0, cut=20.0)


async def waiting(in_flight: InFlight, url: str = URL, *, responding: bool = False) -> asyncio.Task[None]:
    """A request that a worker has had since time 0."""

    async def handle() -> None:
        task = asyncio.current_task()
        assert task is not None
        request = InFlightRequest(task)
        with in_flight.at(url, request, 0.0):
            if responding:
                request.advance(RequestEvent.ANSWER_BEGUN)
            await asyncio.Event().wait()

    task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    return task


async def cause(task: asyncio.Task[None]) -> FailureCause | None:
    """Why the request was aborted; None: it was not."""
    for _ in range(3):
        await asyncio.sleep(0)
    if task.done():
        error = task.exception()
        assert isinstance(error, UpstreamError)
        return error.cause
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def silent_for(seconds: float) -> Callable[[str, float], float]:
    return lambda url, now: seconds


@pytest.mark.parametrize(
    ("responding", "now", "silence", "expected"),
    [
        pytest.param(False, 100.0, 0.0, None, id="alive, until the answer timeout"),
        pytest.param(False, 100.1, 0.0, FailureCause.TIMEOUT, id="alive, after the answer timeout"),
        pytest.param(True, 50.0, 0.0, None, id="alive, until the idle timeout"),
        pytest.param(True, 50.1, 0.0, FailureCause.TIMEOUT, id="alive, after the idle timeout"),
        pytest.param(False, 11.0, 10.0, None, id="silent, until the stall timeout"),
        pytest.param(False, 11.0, 10.1, FailureCause.STALLED, id="silent, after the stall timeout"),
        pytest.param(True, 21.0, 20.0, None, id="silent in its answer, until the cut timeout"),
        pytest.param(True, 21.0, 20.1, FailureCause.STALLED, id="silent in its answer, after the cut timeout"),
        pytest.param(False, 9.0, 30.0, None, id="silent, but not for this request"),
        pytest.param(True, 19.0, 30.0, None, id="silent, but not in this answer"),
    ],
)
async def test_timeouts(responding: bool, now: float, silence: float, expected: FailureCause | None) -> None:
    in_flight = InFlight(TIMEOUTS)
    request = await waiting(in_flight, responding=responding)
    in_flight.enforce_timeouts(now, silent_for(silence))
    assert await cause(request) is expected
    assert len(in_flight) == 0


async def test_while_the_client_reads_no_time_counts() -> None:
    in_flight = InFlight(TIMEOUTS)
    task = asyncio.current_task()
    assert task is not None
    request = InFlightRequest(task)
    with in_flight.at(URL, request, 0.0):
        request.waiting_since = NOT_WAITING
        in_flight.enforce_timeouts(1e9, silent_for(1e9))
        await asyncio.sleep(0)


async def test_a_lost_worker_loses_the_requests_whose_answer_has_not_begun() -> None:
    in_flight = InFlight(TIMEOUTS)
    pending, responding = await waiting(in_flight), await waiting(in_flight, responding=True)
    elsewhere = await waiting(in_flight, OTHER)
    in_flight.abort_pending(URL, FailureCause.LEFT, "it was removed")
    assert [await cause(task) for task in (pending, responding, elsewhere)] == [FailureCause.LEFT, None, None]


async def test_a_client_that_leaves_at_the_moment_of_an_abort_has_left() -> None:
    in_flight = InFlight(TIMEOUTS)
    request = await waiting(in_flight)
    in_flight.abort_pending(URL, FailureCause.LEFT, "it was removed")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_an_abort_ends_one_attempt_only() -> None:
    """At the next worker the request is aborted for reasons of its own, and a client that leaves has left."""
    in_flight, at_next = InFlight(TIMEOUTS), asyncio.Event()

    async def handle() -> None:
        task = asyncio.current_task()
        assert task is not None
        request = InFlightRequest(task)
        with pytest.raises(UpstreamError, match="removed"), in_flight.at(URL, request, 0.0):
            await asyncio.Event().wait()
        request.advance(RequestEvent.ATTEMPT_FAILED)
        with in_flight.at(OTHER, request, 0.0):
            at_next.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    in_flight.abort_pending(URL, FailureCause.LEFT, "it was removed")
    await at_next.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_cannot_happen_is_an_error() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(RuntimeError, match="'answer begun' cannot happen to a request that is choosing"):
        InFlightRequest(task).advance(RequestEvent.ANSWER_BEGUN)
